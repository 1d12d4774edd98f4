"""The measured tolerance: takes what another processor would make, and not what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.tolerance import FLOOR_ULPS, difference, elsewhere, moved, tolerance_of, tolerance_of_pipeline

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t(), lambda t: t.reshape(-1)[1:]], ids=["", "turned", "odd"])
def test_a_copy_lies_elsewhere_and_is_a_unit_away(make: object, dtype: torch.dtype) -> None:
    tensor = make(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype))  # type: ignore[operator]
    copy = elsewhere(tensor)
    assert copy.stride() == tensor.stride() and copy.dtype == dtype
    assert copy.data_ptr() % 64 != tensor.data_ptr() % 64
    assert (copy != tensor).all()
    assert ((copy - tensor).abs() <= torch.finfo(dtype).eps * tensor.abs()).all()
    assert torch.equal(copy, elsewhere(tensor)) and not torch.equal(copy, elsewhere(tensor, seed=1))


def test_weights_are_put_back_as_they_lay() -> None:
    pipeline = zoo.build("flux")
    weight = pipeline.transformer.proj_out.weight
    address, value = weight.data_ptr(), weight.clone()
    with moved(pipeline):
        assert weight is pipeline.transformer.proj_out.weight and not torch.equal(weight, value)
    assert weight.data_ptr() == address and torch.equal(weight, value)


def last_bits(layer: nn.Linear, given: Tensor) -> Tensor:
    """The layer's sums, made in two parts."""
    half = layer.in_features // 2
    left, right = (layer.weight[:, :half], given[:, :half]), (layer.weight[:, half:], given[:, half:])
    return left[1] @ left[0].t() + right[1] @ right[0].t() + layer.bias


@torch.no_grad()
def test_another_order_is_within_and_a_wrong_weight_is_not() -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(512, 64), torch.randn(8, 512)
    allowed = tolerance_of(layer, lambda: [layer(given)])
    plain = [layer(given)]
    assert 0 < difference([last_bits(layer, given)], plain) < allowed < 1e-4
    layer.weight[3, 5] += 0.01
    assert difference([layer(given)], plain) > allowed


def test_what_lets_more_through_is_allowed_more_and_cached() -> None:
    steady, lively = tolerance_of_pipeline("flux"), tolerance_of_pipeline("wan21")
    assert FLOOR_ULPS * EPS <= steady < lively < 1e-2
    assert tolerance_of_pipeline("flux") == steady


@pytest.mark.parametrize("name", ["flux", "wan21"])
def test_a_pipeline_whose_weights_are_a_hundred_units_away_differs(name: str) -> None:
    """The negative control, for the least and the most lively pipeline."""
    pipeline = zoo.build(name)
    plain = zoo.tensors(zoo.run(pipeline, name))
    with moved(pipeline):
        assert difference(zoo.tensors(zoo.run(pipeline, name)), plain) < tolerance_of_pipeline(name)
    with moved(pipeline, 200):
        assert difference(zoo.tensors(zoo.run(pipeline, name)), plain) > tolerance_of_pipeline(name)


def test_a_control_of_nothing_still_allows_the_last_units() -> None:
    assert tolerance_of([], lambda: [torch.ones(3)]) == FLOOR_ULPS * EPS
    assert tolerance_of([], lambda: [torch.ones(3, dtype=torch.bfloat16)]) == FLOOR_ULPS * 2**-7


def test_differences() -> None:
    one = torch.tensor([1.0, 4.0])
    assert difference([one], [one]) == difference([one[:0]], [one[:0]]) == difference([one * 0], [one * 0]) == 0
    assert difference([one + 1], [one]) == pytest.approx(1 / 4)
    assert difference([one], [one * 0]) == 4  # absolute where the plain one is 0
    for other in ([one, one], [one[:1]], [torch.tensor([1.0, math.nan])], [torch.tensor([1.0, math.inf])], []):
        assert difference([one], other) == difference(other, [one]) == math.inf

"""Attention comes to us while somebody needs that, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

from penstock.distributed import dispatch
from penstock.distributed.attention import Call, Sight
from penstock.errors import GenerationError
from tests.distributed.pieces import noise, streams_of


@pytest.fixture
def installed() -> Iterator[None]:
    dispatch.install()
    yield
    dispatch.uninstall()


def sight(ring: int = 1) -> Sight:
    return Sight(streams_of(0, 1, ring, img=6 * ring), ("img",), ("img",))


def test_all_is_as_it_was_after_the_last_user() -> None:
    plain, backends = F.scaled_dot_product_attention, dict(_AttentionBackendRegistry._backends)
    dispatch.install()
    dispatch.install()
    assert F.scaled_dot_product_attention is not plain
    dispatch.uninstall()
    assert F.scaled_dot_product_attention is not plain
    dispatch.uninstall()
    assert F.scaled_dot_product_attention is plain
    assert dict(_AttentionBackendRegistry._backends) == backends


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("is_seeing", [False, True])
def test_both_ways_to_attention_give_what_they_gave(is_seeing: bool) -> None:
    tensor = noise(2, 6, 2, 8)
    expected = dispatch._PLAIN(*[tensor.transpose(1, 2)] * 3, scale=0.3)
    token = dispatch.attending(sight() if is_seeing else None)
    function = F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, scale=0.3)
    backend = dispatch_attention_fn(tensor, tensor, tensor, scale=0.3)
    dispatch.done_attending(token)
    assert torch.equal(function, expected)
    assert torch.equal(backend, expected.transpose(1, 2))


@pytest.mark.usefixtures("installed")
def test_a_sight_may_be_told_from_the_call() -> None:
    seen: list[tuple[int, ...]] = []

    def look(call: Call) -> Sight | None:
        seen.append(tuple(call.query.shape))
        return None

    tensor = noise(2, 6, 2, 8)
    token = dispatch.attending(look)
    F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3)
    dispatch.done_attending(token)
    assert seen == [(2, 6, 2, 8)]


def attend_by_function(tensor: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, dropout_p=0.5)


def attend_by_window(tensor: Tensor) -> Tensor:
    return dispatch._over_ranks(lambda **_: tensor, tensor, tensor, tensor, attention_kwargs={"window_size": (2, 2)})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("call", "ring", "message"),
    [
        (attend_by_function, 1, r"dropout_p=0\.5 differs from rank to rank"),
        (attend_by_window, 2, r"'window_size': \(2, 2\).* cannot go around a ring of 2"),
    ],
)
def test_what_would_be_wrong_is_refused_and_the_sight_stays(call, ring: int, message: str) -> None:
    one = sight(ring)
    token = dispatch.attending(one)
    try:
        with pytest.raises(GenerationError, match=message):
            call(noise(2, 6, 2, 8))
        assert dispatch._SIGHT.get() is one
    finally:
        dispatch.done_attending(token)
    assert dispatch._SIGHT.get() is None

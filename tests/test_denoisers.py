"""The tiny denoisers are fit to compare one process with several: tokens see each other, and read the text."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.zoo.denoisers import CASES, NAMES, Case

VARIANTS = [(name, size) for name in NAMES for size in CASES[name].variants]
RAGGED = [(name, size) for name, size in VARIANTS if size.startswith("masked") and name != "z_image"]  # is not padded
_CACHE: dict[tuple[str, int], torch.nn.Module] = {}


def built(case: Case, heads: int = 4) -> torch.nn.Module:
    """Returns the denoiser of a case, built once."""
    if (case.name, heads) not in _CACHE:
        _CACHE[case.name, heads] = case.build(heads)
    return _CACHE[case.name, heads]


def forward(case: Case, arguments: dict[str, Any], heads: int = 4) -> tuple[Any, ...]:
    """Runs the denoiser of a case and returns its outputs, of one row for each prompt."""
    denoiser = built(case, heads)
    with torch.inference_mode():
        outputs = denoiser(**arguments)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def last(case: Case, output: Any, row: int = 0) -> Tensor:
    """Returns the last token of a row of an output."""
    return output[row].movedim(case.channels, -1).flatten(0, -2)[-1]


def distance(changed: Tensor, reference: Tensor) -> float:
    """Returns how far a tensor has moved, as a share of the reference's norm."""
    return float((changed - reference).norm() / reference.norm())


def touched(arguments: dict[str, Any], key: str, row: int, token: int, channels: int = -1) -> dict[str, Any]:
    """Returns a copy of the arguments with one token of one stream or text replaced."""
    arguments = copy.deepcopy(arguments)
    target = arguments[key][row].movedim(channels, -1)
    grid = target.shape[:-1]
    place = tuple(token if token >= 0 else extent + token for extent in grid)
    target[place] = 1.0 - 2.0 * target[place]
    return arguments


@pytest.mark.parametrize("name", NAMES)
def test_the_same_name_builds_the_same_weights_and_another_head_count_another_model(name: str) -> None:
    state = torch.get_rng_state()
    one = CASES[name].build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    two = CASES[name].build(heads=4).state_dict()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert all(not value.is_floating_point() or value.dtype == torch.float32 for value in one.values())
    three = CASES[name].build(heads=3).state_dict()
    assert any(value.shape != three[key].shape for key, value in one.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_drawn(name: str) -> None:
    denoiser = CASES[name].build()
    assert not denoiser.training
    for key, parameter in denoiser.named_parameters():
        assert not parameter.requires_grad, key
        assert parameter.numel() == 1 or parameter.std() > 0, key
    for stack in CASES[name].stacks:
        assert len(denoiser.get_submodule(stack)) >= 2, stack


@pytest.mark.parametrize(("name", "size"), VARIANTS)
def test_forward_is_fast_finite_and_repeatable(name: str, size: str) -> None:
    case = CASES[name]
    reference = forward(case, case.inputs(size))
    start = time.process_time()
    again = forward(case, case.inputs(size))
    assert time.process_time() - start < 0.5
    assert len(again) == len(case.streams)
    for output, earlier in zip(again, reference, strict=True):
        for row, before in zip(output, earlier, strict=True):
            assert torch.isfinite(row).all()
            assert torch.equal(row, before)
            assert 0.02 < row.std() < 50


@pytest.mark.parametrize(("name", "size"), VARIANTS)
@pytest.mark.parametrize("heads", [4, 3])
def test_tokens_see_each_other(name: str, size: str, heads: int) -> None:
    case = CASES[name]
    reference = forward(case, case.inputs(size), heads)
    for stream in case.streams:
        changed = forward(case, touched(case.inputs(size), stream, 0, 0, case.channels), heads)
        for output, before in zip(changed, reference, strict=True):
            assert distance(last(case, output), last(case, before)) > 1e-3, stream
            assert distance(last(case, output, row=1), last(case, before, row=1)) < 1e-5, "the other row"


@pytest.mark.parametrize(("name", "size"), VARIANTS)
def test_tokens_read_the_text(name: str, size: str) -> None:
    case = CASES[name]
    reference = forward(case, case.inputs(size))
    for key in case.texts:
        changed = forward(case, touched(case.inputs(size), key, 0, 0))
        for output, before in zip(changed, reference, strict=True):
            assert distance(last(case, output), last(case, before)) > 1e-3, key


@pytest.mark.parametrize(("name", "size"), RAGGED)
def test_padding_is_not_read(name: str, size: str) -> None:
    case = CASES[name]
    reference = forward(case, case.inputs(size))
    for key in case.texts:
        changed = forward(case, touched(case.inputs(size), key, 1, -1))
        for output, before in zip(changed, reference, strict=True):
            moved = distance(last(case, output, row=1), last(case, before, row=1))
            assert (moved > 1e-5) is case.leaks, key


@pytest.mark.parametrize("name", NAMES)
def test_every_block_counts(name: str) -> None:
    case = CASES[name]
    reference = forward(case, case.inputs("even"))
    for stack in case.stacks:
        for index, block in enumerate(built(case).get_submodule(stack)):
            scale(block, 0.5)
            outputs = forward(case, case.inputs("even"))
            scale(block, 2.0)
            for output, before in zip(outputs, reference, strict=True):
                assert distance(last(case, output), last(case, before)) > 1e-3, (stack, index)
    for output, before in zip(forward(case, case.inputs("even")), reference, strict=True):
        assert distance(last(case, output), last(case, before)) == 0, "the weights are as they were"


def scale(block: torch.nn.Module, factor: float) -> None:
    """Multiplies all weights of a block by a power of two."""
    for parameter in block.parameters():
        parameter.mul_(factor)


class Forgetful(TorchFunctionMode):
    """Counts the calls of attention; the one of this number sees the first half of its keys only."""

    def __init__(self, number: int = -1) -> None:
        """Forgets in call `number`, from zero; by default in none."""
        super().__init__()
        self.number = number
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, with fewer keys where it is the call to spoil."""
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            if self.calls == self.number:
                query, key, value = args or (kwargs.pop(name) for name in ("query", "key", "value"))
                kept = key.shape[-2] // 2
                args = (query, key[..., :kept, :], value[..., :kept, :])
                if kwargs.get("attn_mask") is not None:
                    kwargs["attn_mask"] = kwargs["attn_mask"][..., :kept]
            self.calls += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_counts(name: str) -> None:
    case = CASES[name]
    with Forgetful() as counter:
        reference = forward(case, case.inputs("even"))
    blocks = sum(len(built(case).get_submodule(stack)) for stack in case.stacks)
    assert counter.calls >= blocks
    for number in range(counter.calls):
        with Forgetful(number):
            outputs = forward(case, case.inputs("even"))
        moved = [
            distance(row, before)
            for output, earlier in zip(outputs, reference, strict=True)
            for row, before in zip(output, earlier, strict=True)
        ]
        assert max(moved) > 1e-3, number

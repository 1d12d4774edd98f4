"""Slices: what is cut comes together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.distributed.slices import Slicing, Surgery, cut, join, keep_slice
from penstock.errors import ModelError
from penstock.undo import Undo

WHOLE = torch.arange(12 * 8, dtype=torch.float32).view(12, 8)


@pytest.mark.parametrize(
    ("dim", "parts"), [(0, (12,)), (0, (6, 6)), (0, (4, 8)), (1, (8,)), (1, (4, 4)), (1, (2, 2, 4)), (-1, (6, 2))]
)
def test_what_is_cut_comes_together_again(dim: int, parts: tuple[int, ...]) -> None:
    slices = [cut(WHOLE, dim, parts, rank, 2) for rank in range(2)]
    assert all(part.numel() * 2 == WHOLE.numel() and part.is_contiguous() for part in slices)
    assert torch.equal(join(slices, dim, parts), WHOLE)


def test_each_rank_has_its_share_of_each_part() -> None:
    assert cut(WHOLE, 0, (4, 8), 1, 2)[:, 0].tolist() == [16, 24, 64, 72, 80, 88]  # rows 2, 3 and 8 to 11


def test_only_one_contiguous_run_is_a_view() -> None:
    begin, end = WHOLE.data_ptr(), WHOLE.data_ptr() + WHOLE.nbytes
    assert begin <= cut(WHOLE, 0, (12,), 1, 2).data_ptr() < end
    assert not begin <= cut(WHOLE, 0, (6, 6), 1, 2).data_ptr() < end
    assert not begin <= cut(WHOLE, 1, (8,), 1, 2).data_ptr() < end


class Echo(Group):
    """A group whose other rank has the rows that this one lacks."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, WHOLE[6:].to(tensor.dtype)]


GROUPS = (Echo("tensor", 0, (0, 1), None), Group("tensor", 1, (0, 1), None))


def test_a_weight_in_memory_is_gathered_in_the_dtype_it_has_by_then() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE.clone()
    weight, undo = layer.weight, Undo()
    keep_slice(
        layer, "weight", Slicing(0, (12,), GROUPS[0]), Surgery(GROUPS[0], undo, lambda weight: False, is_over=True)
    )
    assert torch.equal(layer.weight, WHOLE[:6]) and layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    layer.bfloat16()
    undo.run()
    assert layer.weight is weight and torch.equal(weight, WHOLE.bfloat16())


def test_a_mapped_weight_comes_back_itself() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE
    weight, undo = layer.weight, Undo()
    keep_slice(
        layer, "weight", Slicing(1, (8,), GROUPS[1]), Surgery(GROUPS[1], undo, lambda weight: True, is_over=True)
    )
    assert torch.equal(layer.weight, WHOLE[:, 4:])
    layer._parameters["weight"] = nn.Parameter(torch.zeros(12, 4))  # somebody else's, by now
    undo.run()
    assert layer.weight is weight and weight.data_ptr() == WHOLE.data_ptr()


def test_an_undo_that_was_interrupted_goes_on() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE.clone()
    undo = Undo()
    keep_slice(
        layer, "weight", Slicing(0, (12,), GROUPS[0]), Surgery(GROUPS[0], undo, lambda weight: False, is_over=True)
    )
    (step,) = undo._steps
    step()
    undo.run()
    assert torch.equal(layer.weight, WHOLE)


def test_weights_that_came_after_the_cut_are_gathered() -> None:
    layer = nn.Linear(8, 12, bias=False, device="meta")
    undo = Undo()
    keep_slice(
        layer, "weight", Slicing(0, (12,), GROUPS[0]), Surgery(GROUPS[0], undo, lambda weight: True, is_over=True)
    )
    layer._parameters["weight"] = nn.Parameter(WHOLE[:6].clone())
    undo.run()
    assert torch.equal(layer.weight, WHOLE)


class Deserted(Group):
    """A group whose other rank is gone: to wait for it is to wait for ever."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        raise AssertionError


def test_a_surgery_that_failed_waits_for_nobody_and_its_slices_say_so() -> None:
    layer, group, undo = nn.Linear(8, 12), Deserted("tensor", 0, (0, 1), None), Undo()
    keep_slice(layer, "weight", Slicing(0, (12,), group), Surgery(group, undo))
    undo.run()
    undo.run()
    with pytest.raises(ModelError, match=r"a Linear has 1/2 of its weight.*failed half-way.*Load the pipeline again"):
        layer(torch.zeros(1, 8))


def test_a_slice_that_was_not_made_is_whole() -> None:
    layer, group, undo = nn.Linear(8, 12), Deserted("tensor", 0, (0, 1), None), Undo()
    step = Surgery(group, undo)
    keep_slice(layer, "weight", Slicing(0, (12,), group), step)
    layer.weight.data = torch.zeros(12, 8)  # as it was when its step was added
    undo.run()
    assert layer(torch.ones(1, 8)).shape == (1, 12)

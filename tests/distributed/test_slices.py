"""Slices: what is cut comes together again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.distributed.slices import Slicing, cut, join, keep_slice
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


def test_a_weight_in_memory_is_gathered_in_the_dtype_it_has_by_then() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE.clone()
    weight, undo = layer.weight, Undo()
    keep_slice(layer, "weight", Slicing(0, (12,), Echo("tensor", 0, (0, 1), None)), lambda weight: False, undo)
    assert torch.equal(layer.weight, WHOLE[:6]) and layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    layer.bfloat16()
    undo.run()
    assert layer.weight is weight and torch.equal(weight, WHOLE.bfloat16())


def test_a_mapped_weight_comes_back_itself() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE
    weight, undo = layer.weight, Undo()
    keep_slice(layer, "weight", Slicing(1, (8,), Group("tensor", 1, (0, 1), None)), lambda weight: True, undo)
    assert torch.equal(layer.weight, WHOLE[:, 4:])
    layer._parameters["weight"] = nn.Parameter(torch.zeros(12, 4))  # somebody else's, by now
    undo.run()
    assert layer.weight is weight and weight.data_ptr() == WHOLE.data_ptr()


def test_an_undo_that_was_interrupted_goes_on() -> None:
    layer = nn.Linear(8, 12, bias=False)
    layer.weight.data = WHOLE.clone()
    undo = Undo()
    keep_slice(layer, "weight", Slicing(0, (12,), Echo("tensor", 0, (0, 1), None)), lambda weight: False, undo)
    (step,) = undo._steps
    step()
    undo.run()
    assert torch.equal(layer.weight, WHOLE)


def test_weights_that_came_after_the_cut_are_gathered() -> None:
    layer = nn.Linear(8, 12, bias=False, device="meta")
    undo = Undo()
    keep_slice(layer, "weight", Slicing(0, (12,), Echo("tensor", 0, (0, 1), None)), lambda weight: True, undo)
    layer._parameters["weight"] = nn.Parameter(WHOLE[:6].clone())
    undo.run()
    assert torch.equal(layer.weight, WHOLE)

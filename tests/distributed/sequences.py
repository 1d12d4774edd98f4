"""One denoiser, plain and split over ranks: what the tests of every split share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from penstock.config import ParallelConfig
from penstock.distributed.mesh import build_mesh
from penstock.distributed.sequence import apply_sequence
from penstock.models.rows.table import check_row, row_of
from tests.zoo.denoisers import CASES

TOLERANCE = 1e-4

DEGREES = {
    2: ((2, 1), (1, 2)),
    4: ((4, 1), (1, 4), (2, 2)),
    8: ((8, 1), (2, 4)),
}
"""By the number of ranks, (ulysses, ring)."""


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in a denoiser's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors_of(part)]


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """A forward as pipelines do it."""
    with torch.inference_mode():
        return tensors_of(model(**inputs))


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value; infinite for another shape."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


def compare(name: str, ulysses: int, ring: int, size: str, heads: int) -> tuple[float, float]:
    """On every rank: how far the split denoiser is from the plain one, and how far with attention left local."""
    config = ParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    mesh = build_mesh(config, "cpu")
    model = CASES[name].build(heads=heads)
    row = row_of(model)
    assert row is not None
    check_row(model, row)
    plain = run(model, CASES[name].inputs(size))
    undo = apply_sequence(model, row, mesh)
    split = run(model, CASES[name].inputs(size))
    again = run(model, CASES[name].inputs(size))
    assert difference(again, split) == 0
    undo.run()
    assert difference(run(model, CASES[name].inputs(size)), plain) == 0
    undo = apply_sequence(model, replace(row, attention={}), mesh)
    local = run(model, CASES[name].inputs(size))
    undo.run()
    return difference(split, plain), difference(local, plain)

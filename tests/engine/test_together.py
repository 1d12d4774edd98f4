"""Ranks that call a pipeline as one: equal arguments, equal random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from penstock.engine.together import apply_together
from penstock.errors import RequestError
from tests.ranks import run_ranks

DRAWS = 5


class Dice:
    """Draws from every generator there is."""

    def __call__(self, prompt: str = "", generator: torch.Generator | None = None) -> list[float]:
        """Throw the dice."""
        return [
            float(torch.rand(())),
            random.random(),
            float(np.random.rand()),
            float(torch.rand((), generator=generator)),
        ]


def replica() -> Group:
    return build_mesh(ParallelConfig(ulysses_degree=2), "cpu")["replica"]


def throw(is_together: bool) -> tuple[list[float], list[float]]:
    group = replica()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(group.rank)
    dice = Dice()
    undo = apply_together(dice, group) if is_together else None
    first = dice(generator=torch.Generator().manual_seed(group.rank))
    again = dice(generator=torch.Generator().manual_seed(group.rank + 7))
    if undo is not None:
        assert type(dice) is not Dice
        assert type(dice).__name__ == "Dice" and isinstance(dice, Dice)
        undo.run()
    assert type(dice) is Dice
    return first, again


def test_every_draw_is_the_first_ranks() -> None:
    alone = run_ranks(2, throw, False)
    assert alone[0] != alone[1]
    together = run_ranks(2, throw, True)
    assert together[0] == together[1] == alone[0]


def call_with(arguments: list[dict[str, Any]]) -> str:
    group = replica()
    dice = Dice()
    undo = apply_together(dice, group)
    with pytest.raises(RequestError) as caught:
        dice(**arguments[group.rank])
    undo.run()
    return str(caught.value)


def test_ranks_that_are_asked_for_different_things_all_refuse() -> None:
    texts = run_ranks(2, call_with, [{"prompt": "a"}, {"prompt": "b"}])
    for rank, text in enumerate(texts):
        assert text.startswith("rank 1 of 2 was called with other arguments than rank 0")
        assert f"this is rank {rank}: prompt" in text


def test_alone_nothing_is_changed() -> None:
    dice = Dice()
    apply_together(dice, Group("replica", 0, (0,), None)).run()
    assert type(dice) is Dice

"""Ranks that call a pipeline as one: equal arguments, equal random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock.config import ParallelConfig
from penstock.distributed.mesh import Mesh, alone, build_mesh
from penstock.engine.together import apply_together
from penstock.errors import RequestError
from tests import zoo
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


def pair() -> Mesh:
    return build_mesh(ParallelConfig(ulysses_degree=2), "cpu")


def throw(is_together: bool) -> tuple[list[float], list[float]]:
    mesh = pair()
    rank = mesh["world"].rank
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(rank)
    dice = Dice()
    undo = apply_together(dice, mesh) if is_together else None
    first = dice(generator=torch.Generator().manual_seed(rank))
    again = dice(generator=torch.Generator().manual_seed(rank + 7))
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
    mesh = pair()
    dice = Dice()
    undo = apply_together(dice, mesh)
    with pytest.raises(RequestError) as caught:
        dice(**arguments[mesh["world"].rank])
    undo.run()
    return str(caught.value)


def test_ranks_that_are_asked_for_different_things_all_refuse() -> None:
    texts = run_ranks(2, call_with, [{"prompt": "a"}, {"prompt": "b"}])
    for rank, text in enumerate(texts):
        assert text.startswith("rank 1 of 2 was called with other arguments than rank 0")
        assert f"this is rank {rank}: prompt" in text


def test_alone_nothing_is_changed() -> None:
    dice = Dice()
    apply_together(dice, alone()).run()
    assert type(dice) is Dice


def look_at_every_step() -> list[float]:
    """Each rank reads the latents of every second step alone, and gets latents back."""
    pipeline = zoo.build("wan21")
    config = ParallelConfig(cfg_parallel_size=2)
    placed = penstock.apply(pipeline, device="cpu", offload="none", parallel=config)
    seen = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step % 2 == placed.mesh["world"].rank:
            seen.append(float(tensors["latents"].double().sum()))
        return tensors

    output = zoo.run(pipeline, "wan21", num_inference_steps=4, output_type="latent", callback_on_step_end=look)
    seen.append(float(zoo.tensors(output)[0].double().sum()))
    assert all(type(tensor) is torch.Tensor for tensor in zoo.tensors(output))
    placed.remove()
    return seen


def test_a_callback_may_look_at_tensors_on_one_rank_alone() -> None:
    first, second = run_ranks(2, look_at_every_step)
    assert len(first) == len(second) == 3
    assert first[-1] == second[-1] == second[-2]

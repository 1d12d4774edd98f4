"""Calls of ranks that hold weights together: what was mixed up, and whose random numbers are shared."""

from __future__ import annotations

import pytest
import torch

from penstock.config import ParallelConfig
from penstock.distributed.mesh import build_mesh
from penstock.engine import together
from penstock.engine.together import Meeting, apply_together
from penstock.errors import GenerationError
from tests.engine.test_together import Counted, Dice
from tests.ranks import run_ranks


class Mixed(Counted):
    """Weights of a rank that gathered another unit than it asked for."""

    def __init__(self, is_mixed: bool) -> None:
        super().__init__(0, [])
        self.is_mixed = is_mixed

    def check_fills(self) -> None:
        """As CUDA finds out once the device is past it."""
        if self.is_mixed:
            raise GenerationError("this rank gathers block 1, and the first of those it shares with block 2")


def call_mixed(is_mixed: bool) -> list[str]:
    mesh, dice = build_mesh(ParallelConfig(use_hsdp=True, hsdp_shard_size=2), "cpu"), Dice()
    undo = apply_together(dice, mesh, Meeting(mesh, Mixed(is_mixed)))
    try:
        dice(generator=torch.Generator().manual_seed(1))
        return ["a picture"]
    except GenerationError as error:
        return [str(error)]
    finally:
        undo.run()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_no_picture_is_given_away_that_was_made_with_mixed_weights(is_mixed: bool) -> None:
    for (said,) in run_ranks(2, call_mixed, is_mixed):
        assert said.startswith("this rank gathers block 1" if is_mixed else "a picture")


def test_the_generator_of_the_device_in_use_is_the_one_that_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's current device is the first, whichever its rank has taken."""
    asked: list[torch.device] = []

    def state(device: torch.device) -> torch.Tensor:
        asked.append(device)
        return torch.zeros(16, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "get_rng_state", state)
    own = together._random_states([], torch.device("cuda", 2))
    assert asked == [torch.device("cuda", 2)] and own.cuda == bytes(16)
    assert together._random_states([], torch.device("cpu")).cuda is None

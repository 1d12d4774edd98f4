"""A split VAE that a program calls by itself: all ranks with the same arguments, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import penstock
from penstock.config import ParallelConfig
from penstock.engine import splits, together
from penstock.errors import GenerationError, RequestError
from penstock.undo import Undo
from tests import zoo
from tests.distributed.tiled_vaes import decode, encode, is_plain
from tests.ranks import run_ranks
from tests.turns import by_turns

SHAPES = {
    "flux": ((1, 4, 24, 24), (1, 3, 96, 96)),
    "wan21": ((1, 4, 2, 12, 12), (1, 3, 5, 96, 96)),
    "qwen_image": ((1, 4, 1, 12, 12), (1, 3, 1, 96, 96)),
}


@contextmanager
def split(name: str) -> Iterator[Any]:
    pipe = zoo.build(name)
    pipe.vae.requires_grad_(False)
    with penstock.apply(
        pipe, device="cpu", offload="none", parallel=ParallelConfig(vae_patch_parallel_size=dist.get_world_size())
    ):
        yield pipe.vae


def draw(name: str, method: str, seed: int) -> Tensor:
    return torch.randn(SHAPES[name][method == "encode"], generator=torch.Generator().manual_seed(seed))


def run(vae: Any, name: str, method: str, seed: int) -> Tensor:
    return (decode if method == "decode" else encode)(vae, draw(name, method, seed))


def call_differently(name: str, method: str) -> bool:
    """Each rank its own latents; then all the same, whose result is compared."""
    with split(name) as vae:
        with pytest.raises(RequestError, match="rank 1 of 2 was called with other arguments than rank 0"):
            run(vae, name, method, seed=dist.get_rank())
        shared = run(vae, name, method, seed=7)
    plain, largest = zoo.build(name).vae, shared.abs().max()
    far = float((shared - run(plain, name, method, seed=7)).abs().max() / largest)
    return is_plain(far, plain, lambda: run(plain, name, method, seed=7))


@pytest.mark.parametrize(
    ("name", "method"), by_turns([(name, method) for name in SHAPES for method in ("decode", "encode")], 3)
)
def test_ranks_with_latents_of_their_own_are_refused(name: str, method: str) -> None:
    assert run_ranks(2, call_differently, name, method) == [True, True]


def other_method() -> str:
    with split("flux") as vae, pytest.raises(RequestError) as caught:
        if dist.get_rank():
            vae.encode(draw("flux", "encode", 0))
        else:
            vae.decode(draw("flux", "decode", 0))
    return str(caught.value)


def test_ranks_in_different_methods_are_refused() -> None:
    for message in run_ranks(2, other_method):
        assert "rank 1 of 2" in message


def without_agreement() -> float:
    def none(*_: Any, **__: Any) -> Undo:
        return Undo()

    name = "flux"
    with patch.object(splits, "apply_agreement", none), split(name) as vae:
        result = run(vae, name, "decode", seed=dist.get_rank())
    return float((result - run(zoo.build(name).vae, name, "decode", seed=dist.get_rank())).abs().max())


def test_without_the_agreement_their_pictures_mix() -> None:
    assert max(run_ranks(2, without_agreement)) > 0.1


def call_alone(name: str, method: str) -> tuple[str, float]:
    """Rank 0 calls by itself; rank 1 comes once rank 0 has given up; then both together."""
    first = dist.get_rank() == 0
    with split(name) as vae, patch.object(together, "_PATIENCE_S", 0.0):
        if not first:
            dist.barrier()
        with pytest.raises(GenerationError) as caught:
            run(vae, name, method, seed=0)
        if first:
            dist.barrier()
        dist.barrier()
        with patch.object(together, "_PATIENCE_S", 60.0):
            result = run(vae, name, method, seed=0)
    return str(caught.value), float((result - run(zoo.build(name).vae, name, method, seed=0)).abs().max())


@pytest.mark.parametrize(("name", "method"), by_turns([("flux", "decode"), ("wan21", "encode")], 2))
def test_a_rank_that_calls_alone_does_not_wait_for_ever(name: str, method: str) -> None:
    (alone, difference), (late, other) = run_ranks(2, call_alone, name, method)
    assert "rank 1 did not make the call that rank 0 waits in" in alone
    assert "rank 0 failed" in late
    assert max(difference, other) < 1e-4

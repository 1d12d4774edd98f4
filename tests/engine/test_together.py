"""Ranks that call a pipeline as one: equal arguments, equal random numbers."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

import penstock
from penstock.config import ParallelConfig
from penstock.distributed import parallel_state
from penstock.distributed.guidance.calls import apply_guidance
from penstock.distributed.mesh import Mesh, alone, build_mesh
from penstock.engine.together import Meeting, apply_together
from penstock.errors import GenerationError, RequestError
from tests import zoo
from tests.offload.toys import Pipeline
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of_pipeline

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


class Taker:
    """Takes anything, and returns it."""

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        """Return what is given."""
        return kwargs


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
        assert type(dice) is Dice
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


MAKERS: dict[str, Callable[[int], Any]] = {
    "latents": lambda seed: torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)),
    "array": lambda seed: np.full((2, 3), seed),
    "image": lambda seed: Image.new("RGB", (4, 4), (seed, 0, 0)),
    "nested": lambda seed: {"pictures": [Image.new("L", (4, 4), seed)], "scale": 1.0},
    "key": lambda seed: {f"layer_{seed}": None},
    "nesting": lambda seed: [[1], [2, 3]] if seed else [[1, 2], [3]],
    "kind": lambda seed: Dice() if seed else object(),
}


def called_with(kind: str) -> tuple[str | None, str | None]:
    """What a call says to contents that differ between ranks, and to equal ones."""
    mesh = pair()
    told: list[str | None] = []
    taker = Taker()
    undo = apply_together(taker, mesh)
    for seed in (mesh["world"].rank, 5):
        try:
            taker(**{kind: MAKERS[kind](seed)})
            told.append(None)
        except RequestError as error:
            told.append(str(error))
    undo.run()
    return told[0], told[1]


@pytest.mark.parametrize("kind", MAKERS)
def test_contents_that_differ_are_refused_on_all_ranks_and_equal_ones_are_not(kind: str) -> None:
    for rank, (different, equal) in enumerate(run_ranks(2, called_with, kind)):
        assert different is not None and f"(this is rank {rank}: {kind})" in different
        assert equal is None


def test_devices_may_differ() -> None:
    assert run_ranks(2, with_device) == ["meta", "cpu"]


def with_device() -> str:
    mesh = pair()
    taker = Taker()
    undo = apply_together(taker, mesh)
    device = torch.device(("meta", "cpu")[mesh["world"].rank])
    assert taker(device=device)["device"] is device
    undo.run()
    return device.type


def test_alone_nothing_is_changed() -> None:
    dice = Dice()
    apply_together(dice, alone()).run()
    assert type(dice) is Dice


class Looker:
    """Reads the latents of every second step on each rank alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seen: list[float] = []

    def look(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """As the pipelines of today call it."""
        self.look_at_latents(step, timestep, tensors["latents"])
        return tensors

    def look_at_latents(self, step: int, timestep: Any, latents: torch.Tensor) -> None:
        """As the older ones do."""
        if step % 2 == self.rank:
            assert type(latents) is torch.Tensor
            self.seen.append(float(latents.double().sum()))

    __call__ = look


def callback_of(kind: str, looker: Looker) -> Any:
    """The same in each way that Python has of being called."""
    if kind == "function":
        return lambda *args: looker.look(*args)
    if kind == "partial":
        return functools.partial(Looker.look, looker)
    return looker.look if kind == "method" else looker


def look_at_every_step(kind: str) -> list[float]:
    pipeline = zoo.build("wan21")
    config = ParallelConfig(cfg_parallel_size=2)
    placed = penstock.apply(pipeline, device="cpu", offload="none", parallel=config)
    looker = Looker(placed.mesh["world"].rank)
    seen, look = looker.seen, callback_of(kind, looker)
    output = zoo.run(pipeline, "wan21", num_inference_steps=4, output_type="latent", callback_on_step_end=look)
    seen.append(float(zoo.tensors(output)[0].double().sum()))
    assert all(type(tensor) is torch.Tensor for tensor in zoo.tensors(output))
    placed.remove()
    return seen


@pytest.mark.parametrize("kind", ["function", "method", "partial", "object"])
def test_a_callback_may_look_at_tensors_on_one_rank_alone(kind: str) -> None:
    first, second = run_ranks(2, look_at_every_step, kind, timeout_s=30)
    assert len(first) == len(second) == 3
    assert first[-1] == second[-1] == second[-2]


class Older:
    """A pipeline that makes two predictions and shows their difference, as those of `callback` do."""

    def __init__(self) -> None:
        self.transformer = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.transformer.weight)

    def __call__(self, callback: Callable[..., None]) -> Any:
        """Run."""
        for step in range(3):
            sample = torch.full((1, 3), step + 1.0)
            prediction = self.transformer(sample)  # the other rank's, in every second step
            callback(step, torch.tensor(step), prediction)
        return prediction


def look_with_the_older_callback() -> list[float]:
    mesh = build_mesh(ParallelConfig(cfg_parallel_size=2), "cpu")
    pipeline = Older()
    looker = Looker(mesh["world"].rank)
    apply_guidance(pipeline.transformer, mesh["cfg"])
    apply_together(pipeline, mesh)
    with torch.no_grad():
        pipeline(callback=looker.look_at_latents)
    return looker.seen


def test_the_older_callback_too() -> None:
    assert run_ranks(2, look_with_the_older_callback, timeout_s=30) == [[3.0, 9.0], [6.0]]


def cutting_callback() -> list[float]:
    """One of diffusers' own is known by its class, which says what tensors it takes."""
    pipeline = zoo.build("sd15")
    placed = penstock.apply(pipeline, device="cpu", offload="none", parallel=ParallelConfig(cfg_parallel_size=2))
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    output = zoo.run(pipeline, "sd15", num_inference_steps=4, callback_on_step_end=callback)
    placed.remove()
    plain = zoo.run(pipeline, "sd15", num_inference_steps=4, callback_on_step_end=callback)
    whole = zoo.run(pipeline, "sd15", num_inference_steps=4)
    return [difference(zoo.tensors(output), zoo.tensors(other)) for other in (plain, whole)]


def test_callbacks_of_diffusers_keep_their_class() -> None:
    for far, further in run_ranks(2, cutting_callback):
        assert far < tolerance_of_pipeline("sd15", num_inference_steps=4) < further


def meshes_seen() -> list[bool]:
    ours, others = pair(), build_mesh(ParallelConfig(ring_degree=2), "cpu")
    seen = []

    class Asks:
        def __call__(self) -> None:
            seen.append(parallel_state.get_mesh())

    pipelines = Asks(), Asks()
    undos = [apply_together(one, mesh) for one, mesh in zip(pipelines, (ours, others), strict=True)]
    pipelines[0]()
    pipelines[1]()
    undos[1].run()
    pipelines[0]()
    undos[0].run()
    return [mesh is wanted for mesh, wanted in zip(seen, (ours, others, ours), strict=True)]


def test_in_its_call_each_pipeline_has_its_own_mesh() -> None:
    assert run_ranks(2, meshes_seen) == [[True] * 3] * 2


def another_pipeline() -> tuple[float, float]:
    """A second pipeline with the same denoiser, of which only one rank makes a picture; then all, the first."""
    pipeline = zoo.build("wan21")
    plain = zoo.tensors(zoo.run(pipeline, "wan21", seed=3))[0]
    placed = penstock.apply(pipeline, device="cpu", offload="none", parallel=ParallelConfig(cfg_parallel_size=2))
    second = type(zoo.build("wan21"))(**pipeline.components)
    tensors = zoo.tensors(zoo.run(second, "wan21", seed=3)) if placed.mesh["world"].rank else [plain]
    last = zoo.tensors(zoo.run(pipeline, "wan21", seed=3))[0]
    placed.remove()
    return float((tensors[0] - plain).abs().max()), float((last - plain).abs().max())


def test_another_pipeline_with_the_same_denoiser_runs_on_one_rank_alone() -> None:
    assert run_ranks(2, another_pipeline, timeout_s=40) == [(0.0, 0.0)] * 2


def sibling(is_equal: bool) -> str | float:
    """Another pipeline with a denoiser whose sequences are split, with one seed or one for each rank."""
    pipeline = zoo.build("wan21")
    plain = zoo.tensors(zoo.run(pipeline, "wan21", seed=3))[0]
    with penstock.apply(pipeline, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2)) as placed:
        second = type(zoo.build("wan21"))(**pipeline.components)
        try:
            found = zoo.tensors(zoo.run(second, "wan21", seed=3 if is_equal else placed.mesh["world"].rank))[0]
        except RequestError as error:
            return str(error)
    return difference([found], [plain])


def test_a_split_denoiser_makes_no_picture_of_nobodys_for_another_pipeline() -> None:
    for said in run_ranks(2, sibling, False, timeout_s=40):
        assert "rank 1 of 2 was called with other arguments than rank 0" in str(said)
    for far in run_ranks(2, sibling, True, timeout_s=40):
        assert isinstance(far, float) and far < tolerance_of_pipeline("wan21", seed=3)


def test_ranks_on_the_cpu_leave_cuda_alone() -> None:
    assert run_ranks(2, throw_beside_cuda) == [None, None]


def throw_beside_cuda() -> None:
    dice = Dice()
    undo = apply_together(dice, pair())
    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        patch.object(torch.cuda, "get_rng_state", side_effect=AssertionError("makes a context")),
    ):
        dice()
    undo.run()


def end_apart(way: str, blocks: tuple[int, int], then: str) -> list[Any]:
    """On every rank: a call that ends at a block of its own, the next one, and what the pipeline makes when removed."""
    pipeline = Pipeline(8)
    plain = pipeline()
    parallel = ParallelConfig(use_hsdp=True, hsdp_shard_size=2)
    placed = penstock.apply(pipeline, device="cpu", offload=way, prefetch=2, parallel=parallel)
    last = pipeline.transformer.blocks[blocks[placed.mesh["world"].rank]]

    def stop(*_: Any) -> None:
        raise torch.OutOfMemoryError("there is no more")

    hook = last.register_forward_hook(stop)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline()
    hook.remove()
    found = [torch.equal(pipeline(), plain) for _ in range(2 if then == "call" else 0)]
    placed.remove()
    return [*found, torch.equal(pipeline(), plain)]


@pytest.mark.parametrize("then", ["call", "remove"])
@pytest.mark.parametrize("blocks", [(1, 3), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("way", ["sharded", "layerwise"])
def test_ranks_that_share_weights_go_on_after_each_failed_at_another_block(
    way: str, blocks: tuple[int, int], then: str
) -> None:
    for found in run_ranks(2, end_apart, way, blocks, then, timeout_s=20):
        assert all(found)


class Counted:
    """Units of which so many were filled, the last ones those."""

    def __init__(self, num_fills: int, last: list[int]) -> None:
        self.num_fills = num_fills
        self.last = last
        self.missing: list[int] | None = None

    def last_fills(self) -> list[int]:
        """As given."""
        return self.last

    def catch_up(self, missing: Sequence[int]) -> None:
        """Note it."""
        self.missing = list(missing)


def meet(fills: list[tuple[int, list[int]]], has_failed: bool) -> list[int] | str | None:
    mesh = build_mesh(ParallelConfig(use_hsdp=True, hsdp_shard_size=2), "cpu")
    units = Counted(*fills[mesh["world"].rank])
    meeting = Meeting(mesh, units)
    meeting.is_apart = has_failed and mesh["world"].rank == 1
    try:
        meeting.hold()
    except GenerationError as error:
        return str(error)
    return units.missing


def test_who_is_behind_is_told_what_it_misses() -> None:
    assert run_ranks(2, meet, [(5, [0, 1]), (5, [0, 1])], False) == [None, None]
    assert run_ranks(2, meet, [(5, [0, 1]), (5, [0, 1])], True) == [[], []]
    assert run_ranks(2, meet, [(5, [1, 2, 0]), (7, [0, 2, 1])], False) == [[2, 1], []]
    assert run_ranks(2, meet, [(3, [0, 1, 2]), (1, [0])], True) == [[], [1, 2]]


def test_ranks_that_are_too_far_apart_all_hear_of_it() -> None:
    for said in run_ranks(2, meet, [(5, [1, 2]), (8, [0, 1])], False):
        assert "too far apart on ranks that share weights" in str(said)

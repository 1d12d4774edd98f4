"""Sharded weights: the same picture from parts, each rank with its part and no more, gathered ahead of use."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from torch import Tensor

import penstock
from penstock.config import ParallelConfig
from penstock.engine import build
from penstock.errors import UsageError
from penstock.offload import released, streamer
from penstock.offload.gather import GatherTransfer
from tests import zoo
from tests.parity.test_memory import live_bytes, mapped
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of, tolerance_of_pipeline
from tests.turns import by_turns

FAMILIES = [name for name in zoo.NAMES if name != "stranger"]
ON_FOUR = ["flux", "wan22", "ltx2"]
DEEP = {"num_layers": 10, "num_single_layers": 30}


def shards(size: int, **degrees: int) -> ParallelConfig:
    return ParallelConfig(use_hsdp=True, hsdp_shard_size=size, **degrees)


def made(pipeline: Any, name: str, **overrides: Any) -> list[Tensor]:
    with torch.inference_mode():
        return list(zoo.tensors(zoo.run(pipeline, name, **overrides)))


def try_family(name: str, folder: Path, size: int) -> dict[str, float]:
    """On every rank: how far ways to shard are from the plain pipeline, by turns; every fill is hashed.

    A pipeline from files is compared with one from files, and one built in memory with one built in memory: only then
    do weights lie alike, so that kernels which round by alignment round alike.
    """
    plain = made(DiffusionPipeline.from_pretrained(folder), name)
    found = {}
    for way in by_turns(("sharded", "layerwise", "sequential"), 3, zoo.NAMES.index(name)):
        pipeline = penstock.load(folder, parallel=shards(size), device="cpu", offload=way, check=True)
        found[way] = difference(made(pipeline, name), plain)
        placed = penstock.placed_on(pipeline)
        assert placed is not None and placed.plan.num_sharers == size
        assert placed.plan.shard_bytes < placed.report().peak_bytes <= placed.plan.promised_bytes
        placed.remove()
    pipeline = zoo.build(name)
    built = made(pipeline, name)
    with penstock.apply(pipeline, parallel=shards(size), device="cpu", check=True):
        found["in memory"] = difference(made(pipeline, name), built)
    found["removed"] = difference(made(pipeline, name), built)
    return found


@pytest.mark.parametrize("name", by_turns(FAMILIES, 7))
def test_two_ranks_make_the_picture_from_halves(name: str, zoo_folder: Callable[[str], Path]) -> None:
    for found in run_ranks(2, try_family, name, zoo_folder(name), 2):
        assert found["removed"] == 0
        ways = [found[way] for way in ("sharded", "layerwise", "sequential") if way in found]
        assert ways and max(ways) == 0  # weights lie as in the plain run
        assert found["in memory"] < tolerance_of_pipeline(name)  # on shards they lie at the begin of cache lines


@pytest.mark.parametrize("name", by_turns(ON_FOUR, 3, 2))
def test_four_ranks_make_the_picture_from_quarters(name: str, zoo_folder: Callable[[str], Path]) -> None:
    for found in run_ranks(4, try_family, name, zoo_folder(name), 4):
        assert max(found.values()) < tolerance_of_pipeline(name)


def try_wrong_part(folder: Path) -> bool:
    """On every rank: whether a run whose ranks gather their parts in another order is the plain one."""
    plain = made(DiffusionPipeline.from_pretrained(folder), "flux")
    pipeline = penstock.load(folder, parallel=shards(2), device="cpu", offload="sharded")
    placed = penstock.placed_on(pipeline)
    assert placed is not None and placed._streamer is not None
    for tenant in placed._streamer.tenants:
        store = tenant.source.own  # type: ignore[attr-defined]
        if tenant.unit.is_block:
            store.memory.view(torch.float32)[1024:2048] *= 1.5
    result = made(pipeline, "flux")
    placed.remove()
    return difference(result, plain) < tolerance_of_pipeline("flux")


def test_wrong_parts_would_be_noticed(zoo_folder: Callable[[str], Path]) -> None:
    assert run_ranks(2, try_wrong_part, zoo_folder("flux")) == [False, False]


def deep_flux(root: Path) -> Path:
    """A checkpoint of many blocks, so that slots are a small part of it."""
    pipeline = zoo.build("flux")
    transformer = type(pipeline.transformer).from_config({**pipeline.transformer.config, **DEEP})
    pipeline.register_modules(transformer=transformer.eval())
    pipeline.save_pretrained(root)
    return root


def measure_load(folder: Path, size: int, keeps_whole: bool) -> dict[str, int]:
    """On every rank: bytes that are alive while a checkpoint is loaded and after it, and what was read."""
    gc.collect()
    gc.freeze()  # what jobs before this one have left is not walked
    before, samples = live_bytes(mapped()), [0]
    let_go = released.let_go
    try:
        if keeps_whole:
            streamer.let_go = lambda *_: lambda: None  # type: ignore[attr-defined]
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float64)
            placed = penstock.apply(pipeline, parallel=shards(size), device="cpu", offload="sharded")
        else:
            config = build.LoadConfig.of(device="cpu", offload="sharded")
            prepared = build.prepare(folder, config, shards(size))
            pipeline = build.fill(prepared, lambda event: samples.append(live_bytes(mapped()) - before))
            placed = penstock.placed_on(pipeline)  # type: ignore[assignment]
        after = live_bytes(mapped()) - before
    finally:
        streamer.let_go = let_go  # type: ignore[attr-defined]
        gc.unfreeze()
    assert placed is not None and placed._streamer is not None
    found = {
        "after": after,
        "most": max(samples),
        "weights": placed.plan.weight_bytes,
        "arena": placed.plan.arena_bytes,
        "fixed": placed.plan.fixed_bytes,
        "read": placed.report().read_bytes,
        "unit": max(unit.num_bytes for unit in placed.plan.units),
    }
    if not keeps_whole:
        placed.remove()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_and_reads_no_more(size: int, tmp_path: Path) -> None:
    folder = deep_flux(tmp_path / "deep")
    ranks = run_ranks(size, measure_load, folder, size, False)
    for found in ranks:
        part = 1.1 * found["weights"] / size
        assert found["after"] <= part + found["arena"] + found["fixed"]
        assert found["most"] <= part + found["arena"] + found["fixed"] + found["unit"]
        assert found["arena"] < found["weights"] / 4
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert sum(found["read"] for found in ranks) <= 1.05 * stored


def test_whole_weights_that_stay_alive_would_be_noticed(tmp_path: Path) -> None:
    folder = deep_flux(tmp_path / "deep")
    for found in run_ranks(2, measure_load, folder, 2, True):
        assert found["after"] > 1.1 * found["weights"] / 2 + found["arena"] + found["fixed"]


def log_of(folder: Path, num_steps: int, prefetch: int) -> tuple[list[str], int, int, list[str]]:
    """On every rank: what was asked for and what computed, in order; gatherings; streamed blocks; their names."""
    log: list[str] = []
    submit = GatherTransfer.submit

    def noted(self: GatherTransfer, name: str, *rest: Any) -> Any:
        log.append(f"gather {name}")
        return submit(self, name, *rest)

    GatherTransfer.submit = noted  # type: ignore[method-assign]
    try:
        pipeline = penstock.load(folder, parallel=shards(2), device="cpu", offload="sharded", prefetch=prefetch)
        placed = penstock.placed_on(pipeline)
        assert placed is not None and placed._streamer is not None
        names = []
        for tenant in placed._streamer.tenants:
            if tenant.unit.is_block and tenant.unit.component == "transformer":
                names.append(tenant.name)
                name = f"compute {tenant.name}"
                tenant.unit.module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
        placed.mesh["shard"].traffic.clear()
        made(pipeline, "flux", num_inference_steps=num_steps)
        gathered = placed.mesh["shard"].traffic.num_calls["all_gather"]
        streamed = sum(tenant.plan.slot is not None for tenant in placed._streamer.tenants if tenant.name in names)
        placed.remove()
    finally:
        GatherTransfer.submit = submit  # type: ignore[method-assign]
    return log, gathered, streamed, names


@pytest.mark.parametrize("prefetch", [1, 2])
def test_blocks_are_gathered_ahead_of_use_also_across_steps(prefetch: int, zoo_folder: Callable[[str], Path]) -> None:
    folder = zoo_folder("flux")
    for log, _, streamed, names in run_ranks(2, log_of, folder, 3, prefetch):
        assert streamed == len(names) > prefetch
        computed = [position for position, entry in enumerate(log) if entry.startswith("compute")]
        assert [log[position] for position in computed] == [f"compute {name}" for name in names] * 3
        for number, position in enumerate(computed[:-1]):
            following = log[computed[number + 1]].replace("compute", "gather")
            number_before = log[:position].count(following)
            assert number_before == (number + 1) // len(names) + 1, log[position]  # asked for before this one computes


def test_a_forward_gathers_each_streamed_block_once(zoo_folder: Callable[[str], Path]) -> None:
    folder = zoo_folder("flux")
    few = run_ranks(2, log_of, folder, 2, 1)
    many = run_ranks(2, log_of, folder, 5, 1)
    for (_, short, streamed, _), (_, long, _, _) in zip(few, many, strict=True):
        assert long - short == 3 * streamed > 0


class TwoStages:
    """LTX-2 as its makers run it: a small video, its latents made larger, and steps on those."""

    def __init__(self) -> None:
        self.pipe = zoo.build("ltx2")
        torch.manual_seed(1)
        upsampler = LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1)
        self.upsample = LTX2LatentUpsamplePipeline(vae=self.pipe.vae, latent_upsampler=upsampler.eval())

    def __call__(self) -> list[Tensor]:
        with torch.inference_mode():
            video, sound = zoo.run(self.pipe, "ltx2", output_type="latent", return_dict=False)
            size = {"height": video.shape[-2] * 16, "width": video.shape[-1] * 16}
            larger = self.upsample(latents=video, output_type="latent", return_dict=False)[0]
            second = zoo.run(self.pipe, "ltx2", latents=larger, audio_latents=sound, output_type="latent", **size)
        return [larger, *zoo.tensors(second)]


def try_two_stages(size: int) -> list[float]:
    """On every rank: how far two stages from shards, on the devices and off them, are from the plain ones, as a share
    of what is allowed."""
    stock, found = TwoStages(), []
    plain = stock()
    allowed = tolerance_of([stock.pipe, stock.upsample.latent_upsampler], stock, plain)
    for way in ("sharded", "layerwise"):
        pipeline = TwoStages()
        with penstock.apply(pipeline, parallel=shards(size), device="cpu", offload=way, check=True) as placed:
            assert {unit.component for unit in placed.plan.units} >= {"pipe.transformer", "upsample.latent_upsampler"}
            found.append(difference(pipeline(), plain) / allowed)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_two_stages_of_ltx2(size: int) -> None:
    for found in run_ranks(size, try_two_stages, size):
        assert max(found) < 1


def try_sharing(folder: Path, way: str) -> tuple[float, int, int]:
    """On every rank: how far a guided run is from the plain one, and what it gathers with and without sharing."""
    plain, gathered, far = made(DiffusionPipeline.from_pretrained(folder), "qwen_image", num_inference_steps=4), [], []
    for shares in (False, True):
        options = {"offload": way, "max_weight_memory": "least", "share_blocks": shares, "check": True}
        pipeline = penstock.load(folder, parallel=shards(2), device="cpu", **options)
        placed = penstock.placed_on(pipeline)
        assert placed is not None
        far.append(difference(made(pipeline, "qwen_image", num_inference_steps=4), plain))
        gathered.append(placed.report().num_fills)
        placed.remove()
    return max(far), gathered[0], gathered[1]


@pytest.mark.parametrize("way", ["sharded", "layerwise"])
def test_two_calls_of_guidance_gather_a_block_once(way: str, zoo_folder: Callable[[str], Path]) -> None:
    for far, apart, shared in run_ranks(2, try_sharing, zoo_folder("qwen_image"), way):
        assert far == 0
        assert shared < 0.75 * apart


def try_without_guidance(name: str, way: str) -> float:
    """On every rank: how far a pipeline without guidance, whose guidance would be split, is from the plain one, as a
    share of what is allowed."""
    plain = made(zoo.build(name), name, guidance_scale=1.0)
    pipeline = zoo.build(name)
    parallel = ParallelConfig(cfg_parallel_size=2, use_hsdp=True)
    with penstock.apply(pipeline, parallel=parallel, device="cpu", offload=way):
        return difference(made(pipeline, name, guidance_scale=1.0), plain) / tolerance_of_pipeline(
            name, guidance_scale=1.0
        )


@pytest.mark.parametrize("way", ["sharded", "layerwise", "sequential"])
def test_without_guidance_ranks_gather_in_one_order(way: str) -> None:
    for share in run_ranks(2, try_without_guidance, "wan21", way):
        assert share < 1


def try_tied(swaps: bool) -> list[float]:
    """On every rank: two weights tied across blocks, whose memory lies in another order on one of them; how far runs
    are from the plain one, as a share of what is allowed."""
    pipeline = zoo.build("flux")
    blocks = pipeline.transformer.single_transformer_blocks
    size = blocks[0].attn.to_q.weight.shape
    generator = torch.Generator().manual_seed(5)
    room = torch.empty(2, *size)
    order = (1, 0) if swaps and torch.distributed.get_rank() == 1 else (0, 1)
    for number, name in zip(order, ("to_q", "to_k"), strict=True):
        room[number].copy_(torch.randn(size, generator=generator) * 0.1)
        for block in blocks[:2]:
            getattr(block.attn, name).weight = torch.nn.Parameter(room[number])
    plain = made(pipeline, "flux")
    allowed = tolerance_of_pipeline("flux")
    with penstock.apply(pipeline, parallel=shards(2), device="cpu", offload="sharded"):
        found = made(pipeline, "flux")
    return [difference(found, plain) / allowed, difference(made(pipeline, "flux"), plain) / allowed]


@pytest.mark.parametrize("swaps", [False, True])
def test_tied_weights_that_lie_elsewhere_on_another_rank(swaps: bool) -> None:
    for run, removed in run_ranks(2, try_tied, swaps):
        assert run < 1 and removed < 1


def try_written(way: str) -> list[str]:
    """On every rank: what runs say after a weight was changed in place, and how the last one came out."""
    pipeline = zoo.build("flux")
    plain, allowed = made(pipeline, "flux"), tolerance_of_pipeline("flux")
    said = []
    with penstock.apply(pipeline, parallel=shards(2), device="cpu", offload=way):
        made(pipeline, "flux")
        for tensor in pipeline.transformer.parameters():
            if type(tensor) is torch.nn.Parameter:
                with torch.no_grad():
                    tensor.mul_(2)
        for _ in range(2):
            try:
                said.append("equal" if difference(made(pipeline, "flux"), plain) < allowed else "different")
            except UsageError:
                said.append("refused")
    return said


@pytest.mark.parametrize("way", ["sharded", "layerwise"])
def test_weights_that_were_changed_in_place_come_anew(way: str) -> None:
    assert run_ranks(2, try_written, way) == [["refused", "equal"]] * 2

"""The streamer as a whole: the plain result at a fraction of the bytes, and nothing left when it is removed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.errors import ConfigError, WeightsError
from penstock.offload import streamer as streamers
from penstock.offload.cold import ColdTensor
from penstock.offload.streamer import Settings, Streamer
from penstock.timeline import Timeline
from penstock.weights.maps import MappedFiles
from tests import zoo
from tests.offload.toys import CPU, Pipeline, streamed
from tests.waiting import has_ended


def modules_of(pipeline: Any) -> list[nn.Module]:
    parts = getattr(pipeline, "components", None) or vars(pipeline)
    return [module for part in parts.values() if isinstance(part, nn.Module) for module in part.modules()]


def traces(pipeline: Any) -> list[Any]:
    """Everything that an installation could leave: attributes, hooks, the very tensors."""
    found: list[Any] = [sorted(vars(pipeline))]
    for module in modules_of(pipeline):
        found.append(sorted(vars(module)))
        found.extend(len(value) for name, value in sorted(vars(module).items()) if "hooks" in name)
        found.extend(id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()))
    return found


def addresses(streamer: Streamer) -> list[int]:
    return [live.data_ptr() for tenant in streamer.tenants for live in tenant.live]


@pytest.mark.parametrize("has_run", [True, False])
def test_removing_leaves_nothing(has_run: bool) -> None:
    pipeline = zoo.build("flux")
    zoo.run(pipeline, "flux")  # leaves traces of its own
    before = traces(pipeline)
    for _ in range(2):
        with streamed(pipeline, 1) as streamer:
            assert traces(pipeline) != before
            assert any(isinstance(weight, ColdTensor) for weight in pipeline.transformer.parameters())
            if has_run:
                zoo.run(pipeline, "flux")
            streamer.remove()  # and once more at the end
        assert traces(pipeline) == before
        assert has_ended()


def test_removing_in_the_middle_of_fills_leaves_nothing() -> None:
    pipeline = Pipeline()
    before = traces(pipeline)
    expected = Pipeline()()
    with streamed(pipeline, 2) as streamer:
        for tenant in streamer.tenants:
            streamer.residency.enter(tenant)
    assert traces(pipeline) == before and has_ended()
    assert torch.equal(pipeline(), expected)


def test_an_installation_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError("no guards today")

    pipeline = Pipeline()
    before = traces(pipeline)
    monkeypatch.setattr(streamers, "guard", fail)
    with pytest.raises(ConfigError, match="no guards today"), streamed(pipeline, 1):
        raise AssertionError("installed")
    assert traces(pipeline) == before and has_ended()


def test_nothing_keeps_a_removed_arena_alive() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        pipeline()
        arena = torch.utils.weak.WeakTensorKeyDictionary({streamer.arena.tensor: 1})
    del streamer
    gc.collect()
    assert len(arena) == 0


def test_addresses_are_the_same_over_runs() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        seen: set[tuple[str, int]] = set()
        for name, block in pipeline.transformer.blocks.named_children():
            block.register_forward_hook(lambda b, *_, n=name: seen.add((n, b.linear.weight.data_ptr())))
        before = addresses(streamer)
        for num_steps in (3, 1, 2):
            pipeline(num_steps)
        assert addresses(streamer) == before and len(seen) == 6


def test_settings_reach_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline()
    config = OffloadConfig(device="cpu", offload="layerwise", max_weight_memory="least")
    planned = plan_pipeline(pipeline, config, CPU, lambda *_: None)
    expected = pipeline()
    settings = Settings(in_host_store=True, is_checked=True)
    streamer = Streamer(pipeline, planned.partition, planned.plan, settings, Timeline())
    assert bool((streamer.arena.tensor == 0xFF).all())
    streamer.install()
    assert torch.equal(pipeline(), expected)
    moving = [tenant for tenant in streamer.tenants if tenant.plan.residency != "resident"]
    assert streamer.host_bytes == sum(tenant.plan.num_bytes for tenant in moving) > 0
    assert {tenant.source.kind for tenant in moving} == {"host"} and streamer.store is not None
    streamer.remove()
    assert torch.equal(pipeline(), expected) and has_ended()


def test_fixed_buffers_move_with_their_ties_and_come_back() -> None:
    pipeline = Pipeline()
    table = torch.arange(4.0)
    pipeline.transformer.register_buffer("table", table, persistent=False)
    pipeline.vae.register_buffer("table", table, persistent=False)
    pipeline.vae.register_buffer("count", torch.tensor(3), persistent=False)
    with streamed(pipeline, 1, dtypes={id(table): torch.bfloat16}) as streamer:
        assert pipeline.transformer.table is pipeline.vae.table
        assert pipeline.vae.table.dtype is torch.bfloat16 and pipeline.vae.count.item() == 3
        assert streamer.plan.fixed_bytes == 4 * 2 + 8
        pipeline.vae.table = mine = torch.zeros(1)
    assert torch.equal(pipeline.transformer.table, table.bfloat16()) and pipeline.vae.table is mine


def test_a_weight_that_components_share_streams_to_one_place() -> None:
    pipeline, plain = Pipeline(), Pipeline()
    for pipe in (pipeline, plain):
        pipe.vae.linear.weight = pipe.transformer.blocks[0].linear.weight
    expected = plain()
    with streamed(pipeline, 1, is_checked=True) as streamer:
        assert torch.equal(pipeline(), expected)
        assert torch.equal(pipeline(), expected)
        (shared,) = [tenant for tenant in streamer.tenants if tenant.name == "shared"]
        assert shared.plan.residency == "resident" and len(shared.live) == 2
        assert pipeline.vae.linear.weight.data_ptr() == pipeline.transformer.blocks[0].linear.weight.data_ptr()
        assert streamer.timeline is not None
        assert [stay.unit for stay in streamer.timeline.residences].count("shared") == 1
    with streamed(pipeline, 1):  # a compiler never meets the stand-in of what is shared
        for block in pipeline.transformer.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert torch.equal(pipeline(), expected)


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan22", "ltx2"])
def test_pipelines_of_files_give_the_plain_result(name: str, zoo_folder: Callable[[str], Path]) -> None:
    def load() -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(zoo_folder(name))

    expected = zoo.tensors(zoo.run(load(), name))
    pipeline = load()
    files = MappedFiles()
    config = OffloadConfig(device="cpu", offload="layerwise", prefetch=1, max_weight_memory="least")
    planned = plan_pipeline(
        pipeline, config, CPU, lambda _, tensor, size: files.locate(tensor.data_ptr(), size, tensor.dtype)
    )
    streamer = Streamer(pipeline, planned.partition, planned.plan, Settings(is_checked=True), Timeline())
    streamer.install()
    assert {tenant.source.kind for tenant in streamer.tenants} == {"file"}
    for _ in range(2):
        assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, name)), expected))
    assert streamer.residency.peak_bytes <= streamer.plan.arena_bytes < streamer.plan.weight_bytes
    assert streamer.reader.read_bytes > 0
    streamer.remove()
    assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, name)), expected))


def test_a_file_that_changes_underneath_is_told(tmp_path: Path) -> None:
    path = zoo.folder("flux", tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(path)
    files = MappedFiles()
    config = OffloadConfig(device="cpu", offload="layerwise", max_weight_memory="least")
    planned = plan_pipeline(
        pipeline, config, CPU, lambda _, tensor, size: files.locate(tensor.data_ptr(), size, tensor.dtype)
    )
    streamer = Streamer(pipeline, planned.partition, planned.plan, Settings())
    streamer.install()
    zoo.run(pipeline, "flux")
    (file,) = (path / "transformer").glob("*.safetensors")
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="vanished while its weights are streamed"):
        zoo.run(pipeline, "flux")
    (tmp_path / "elsewhere").rename(file)
    zoo.run(pipeline, "flux")
    streamer.remove()
    assert has_ended()

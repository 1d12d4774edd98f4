"""From a configuration to a plan: modes, budgets, and refusals with numbers, before any weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import penstock
from penstock.config import LoadConfig, OffloadConfig
from penstock.engine import plans
from penstock.engine.build import prepare
from penstock.engine.plans import plan_pipeline
from penstock.errors import ConfigError
from penstock.machine import read_machine
from penstock.plan import Plan
from tests import zoo
from tests.turns import by_turns

CPU = torch.device("cpu")


def planned(pipeline: object, device: torch.device = CPU, **options: object) -> Plan:
    return plan_pipeline(pipeline, OffloadConfig(**options), device, lambda *_: None).plan


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the machine have other numbers."""
    return lambda **numbers: monkeypatch.setattr(
        plans, "read_machine", lambda device: replace(read_machine(), **numbers)
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    by_turns([(name, mode) for name in zoo.NAMES if name != "stranger" for mode in ("sequential", "layerwise")], 5),
)
def test_plan_from_the_headers_is_the_plan_of_the_loaded_weights(
    name: str, mode: str, zoo_folder: Callable[[str], Path]
) -> None:
    foreseen = prepare(zoo_folder(name), LoadConfig(offload=mode)).plan
    pipeline = penstock.load(zoo_folder(name), offload=mode)
    placed = penstock.placed_on(pipeline)
    assert placed is not None
    slack = 2 * 4096 * len(foreseen.units)  # where files and modules disagree on names, pages are not known before
    assert abs(placed.plan.promised_bytes - foreseen.promised_bytes) <= slack
    assert [unit.name for unit in placed.plan.units] == [unit.name for unit in foreseen.units]
    if name in ("flux", "wan22", "z_image", "sd3"):
        assert placed.plan == foreseen


def test_auto_without_a_budget_goes_by_the_free_memory(shrink: Callable[..., None]) -> None:
    pipeline = zoo.build("flux")
    total = planned(pipeline, offload="none").weight_bytes
    modes = {}
    for share in (10, 1.2, 0.6):
        shrink(device_free_bytes=int(total * share))
        plan = planned(pipeline)
        modes[share] = plan.offload
        assert plan.promised_bytes <= 0.7 * total * share or plan.offload == "none"
    assert modes == {10: "none", 1.2: "sequential", 0.6: "layerwise"}


def test_promise_beyond_the_device_is_refused_with_numbers(shrink: Callable[..., None]) -> None:
    pipeline = zoo.build("flux")
    shrink(device_bytes=2**20, limited_by="cgroup /somewhere")
    with pytest.raises(ConfigError, match=r"are more than cpu has, 1 MiB \(limited by cgroup /somewhere\).*layerwise"):
        planned(pipeline, offload="sequential")
    with pytest.raises(ConfigError, match="do not fit on cuda, which has 1 MiB"):
        planned(pipeline, torch.device("cuda"), offload="none")


def test_device_that_cannot_stream_is_refused_or_left_alone_by_auto(shrink: Callable[..., None]) -> None:
    pipeline = zoo.build("flux")
    shrink(device_bytes=2**40, device_free_bytes=2**40)
    with pytest.raises(ConfigError, match="streams to cpu and cuda devices"):
        planned(pipeline, torch.device("mps"), offload="layerwise")
    assert planned(pipeline, torch.device("mps")).offload == "none"


def test_dtype_counts_on_the_device(zoo_folder: Callable[[str], Path]) -> None:
    sizes = {
        dtype: prepare(zoo_folder("flux"), LoadConfig(offload="layerwise", dtype=dtype)).plan.weight_bytes
        for dtype in ("float32", "bfloat16")
    }
    assert 0.45 < sizes["bfloat16"] / sizes["float32"] < 0.6  # gaps for alignment count in both


def test_quantised_weights_are_named_one_by_one() -> None:
    pipeline = zoo.build("flux")
    layer = pipeline.transformer.proj_out

    class Packed(torch.Tensor):
        """Stands for a library's own kind of weight."""

    layer.weight.requires_grad_(False)
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Packed)
    with pytest.raises(ConfigError, match=r"1 weights cannot be streamed: transformer\.proj_out\.weight \(Packed\)"):
        planned(pipeline, offload="layerwise")
    assert planned(pipeline, offload="none").offload == "none"


def test_accelerators_get_addresses_at_multiples_of_256(shrink: Callable[..., None]) -> None:
    shrink(device_bytes=2**40)
    plan = planned(zoo.build("flux"), torch.device("cuda"), offload="layerwise", max_weight_memory="1.5MiB")
    assert all(unit.begin % 256 == 0 for unit in plan.units)
    assert plan.promised_bytes <= 1.5 * 2**20

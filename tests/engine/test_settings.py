"""How a plan is carried out: what free memory decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from penstock.config import OffloadConfig
from penstock.distributed.group import Group
from penstock.engine.plans import Planned, plan_pipeline
from penstock.engine.settings import notes_of_plan, settings_of
from penstock.machine import read_machine
from tests.offload.toys import CPU, Pipeline

ALONE = Group("shard", 0, (0,), None)
CONFIG = OffloadConfig(device="cpu", offload="layerwise")


@pytest.fixture
def planned() -> Planned:
    return plan_pipeline(Pipeline(), CONFIG, CPU, lambda *_: None)


def test_a_gpu_takes_what_streams_from_pinned_memory_where_there_is_room(planned: Planned) -> None:
    machine = replace(read_machine("cpu"), device="cuda:0")
    assert settings_of(planned, CONFIG, machine, ALONE).in_host_store
    assert not settings_of(planned, CONFIG, replace(machine, host_free_bytes=10), ALONE).in_host_store
    assert not settings_of(planned, CONFIG, replace(machine, device="cpu"), ALONE).in_host_store


def test_shards_need_a_share_of_that_room(planned: Planned) -> None:
    moving = sum(
        piece.num_bytes
        for unit, place in zip(planned.partition.units, planned.plan.units, strict=True)
        for piece in unit.pieces
        if place.residency != "resident"
    )
    machine = replace(read_machine("cpu"), device="cuda:0", host_free_bytes=moving)
    assert not settings_of(planned, CONFIG, machine, ALONE).in_host_store
    pair = Group("shard", 1, (0, 1), None)
    settings = settings_of(planned, CONFIG, machine, pair)
    assert settings.in_host_store and settings.sharers is pair
    assert settings_of(planned, CONFIG, machine, ALONE).sharers is None


def test_the_rest_is_passed_on(planned: Planned) -> None:
    told: list[int] = []
    config = replace(CONFIG, check=True)
    settings = settings_of(planned, config, read_machine("cpu"), ALONE, on_read=lambda *a: told.append(1))
    assert settings.is_checked and settings.on_read is not None and not settings.is_direct


def test_weights_that_only_memory_has_are_noted(planned: Planned) -> None:
    (note,) = notes_of_plan(planned, CONFIG)
    assert "bytes of weights were cast, made or changed in memory" in note
    shared = plan_pipeline(Pipeline(), CONFIG, CPU, lambda *_: None, num_sharers=2)
    assert notes_of_plan(shared, CONFIG) == []


def test_options_without_effect_are_noted() -> None:
    config = OffloadConfig(device="cpu", prefetch=2, max_weight_memory="1GiB")
    planned = plan_pipeline(Pipeline(), config, torch.device("cpu"), lambda *_: None)
    assert planned.plan.offload == "none"
    (note,) = notes_of_plan(planned, config)
    assert note.startswith("prefetch has nothing to act on")

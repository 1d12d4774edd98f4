"""Ranks that know the same and fail together."""

from __future__ import annotations

import time

import pytest
import torch

import penstock
from penstock.config import OffloadConfig, ParallelConfig
from penstock.distributed.environment import RankEnvironment
from penstock.distributed.group import Group
from penstock.distributed.launcher import GROUPS
from penstock.distributed.mesh import alone, build_mesh
from penstock.engine import ranks
from penstock.engine.ranks import agreed, join_ranks, shared_machine
from penstock.errors import ConfigError, ModelError
from penstock.machine import read_machine
from tests.offload.toys import Pipeline
from tests.ranks import run_ranks

CPU = OffloadConfig(device="cpu")


def test_one_process_is_alone() -> None:
    device, mesh = join_ranks(CPU, None)
    assert (device.type, mesh["world"].size) == ("cpu", 1)
    assert join_ranks(CPU, ParallelConfig())[1]["world"].size == 1


def test_ranks_that_nobody_started_are_refused_with_the_way_to_start_them() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 4"):
        join_ranks(CPU, ParallelConfig(ulysses_degree=4))


def test_ranks_that_a_launcher_started_must_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = RankEnvironment(0, 4, 0, 4, "127.0.0.1", 29500)
    monkeypatch.setattr(ranks, "read_environment", lambda: environment)
    with pytest.raises(ConfigError, match=r"ring\(2\) = 2 is not world_size\(4\).*--data-parallel-size 2"):
        join_ranks(CPU, ParallelConfig(ring_degree=2))
    with pytest.raises(ConfigError, match=r"nothing split \(1\) = 1 is not world_size\(4\)"):
        join_ranks(CPU, ParallelConfig())
    assert join_ranks(CPU, None)[1]["world"].size == 1  # a program that uses its ranks for itself


def ask(wishes: list[tuple[dict[str, int], str]]) -> str:
    degrees, device = wishes[torch.distributed.get_rank()]
    try:
        join_ranks(OffloadConfig(device=device), ParallelConfig(**degrees))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_ask_for_different_things_hear_of_it() -> None:
    wishes = [({"ulysses_degree": 2}, "cpu"), ({"ring_degree": 2}, "cpu")]
    for said in run_ranks(2, ask, wishes):
        assert said.startswith("rank 1 was asked for something else than rank 0")
    assert run_ranks(2, ask, [wishes[0], wishes[0]]) == ["", ""]


def test_a_rank_without_its_device_is_nobodys_wait() -> None:
    first, second = run_ranks(2, ask, [({"ulysses_degree": 2}, "cpu"), ({"ulysses_degree": 2}, "cuda")])
    assert first.startswith("rank 1 of 2 cannot go on, and the others not without it: device='cuda' is not on this")
    assert "device='cuda' is not on this machine" in second


@pytest.mark.parametrize("degrees", [{"data_parallel_size": 2}, {"hsdp_replicate_size": 2}], ids=str)
def test_ranks_with_nobody_to_share_weights_with_hear_of_it(degrees: dict[str, int]) -> None:
    for said in run_ranks(2, ask, [({"use_hsdp": True, **degrees}, "cpu")] * 2):
        assert "on 2 ranks: each rank has nobody to share its weights with" in said
    with pytest.raises(ConfigError, match="on 1 rank: each rank has nobody to share its weights with"):
        join_ranks(CPU, ParallelConfig(use_hsdp=True, **degrees))


def memory() -> tuple[int, int, str]:
    mesh = build_mesh(ParallelConfig(ulysses_degree=4), "cpu")
    machine = shared_machine(torch.device("cpu"), mesh)
    assert machine.device_free_bytes == machine.host_free_bytes
    return machine.host_bytes, machine.host_free_bytes, machine.limited_by


def test_ranks_plan_with_the_same_share_of_the_host() -> None:
    found = run_ranks(4, memory)
    assert len(set(found)) == 1
    assert found[0][0] == read_machine("cpu").host_bytes // 4
    assert found[0][2].endswith("shared by 4 ranks")
    assert shared_machine(torch.device("cpu"), alone()).host_bytes == read_machine("cpu").host_bytes


def fail_on(rank: int) -> str:
    world = build_mesh(ParallelConfig(ulysses_degree=2), "cpu")["world"]

    def step() -> str:
        if world.rank == rank:
            raise ModelError("there is no more.")
        return "done"

    begun_s = time.perf_counter()
    try:
        result = agreed(world, step)
    except (ModelError, ConfigError) as error:
        result = f"{type(error).__name__}: {error}"
    assert time.perf_counter() - begun_s < 10
    assert agreed(world, lambda: "next") == "next"
    return result


def test_groups_of_an_engine_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    alone_with_it = shared_machine(cpu, alone())
    monkeypatch.setenv(GROUPS, "4")
    shared = shared_machine(cpu, alone())
    assert shared.host_bytes == alone_with_it.host_bytes // 4 and shared.device_bytes == shared.host_bytes
    assert "shared by 4 ranks" in shared.limited_by


def test_a_step_that_fails_on_one_rank_fails_on_all() -> None:
    assert run_ranks(2, fail_on, None) == ["done", "done"]
    first, second = run_ranks(2, fail_on, 1)
    assert first.startswith("ConfigError: rank 1 of 2 cannot go on")
    assert second == "ModelError: there is no more."


def test_alone_a_step_is_just_taken() -> None:
    assert agreed(Group("world", 0, (0,), None), lambda: 3) == 3


def share_strange_weights(is_strange: bool) -> str:
    """On every rank: what is said to weights of the same layout that are others on rank 1."""
    pipeline = Pipeline()
    if is_strange and torch.distributed.get_rank() == 1:
        with torch.no_grad():
            pipeline.transformer.head.weight.mul_(1.5)
    plain, said = pipeline(), ""
    try:
        with penstock.apply(pipeline, device="cpu", parallel=ParallelConfig(use_hsdp=True, hsdp_shard_size=2)):
            pipeline()
    except ConfigError as error:
        said = str(error)
    assert torch.equal(pipeline(), plain)
    return said


def test_ranks_with_other_weights_do_not_share_them() -> None:
    assert run_ranks(2, share_strange_weights, False) == ["", ""]
    first, second = run_ranks(2, share_strange_weights, True)
    assert second.startswith("rank 1 has other weights than rank 0, of the same layout")
    assert "rank 1" in first and "has other weights than rank 0" in first

"""The mesh: its groups, and its errors."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from penstock.config import ParallelConfig
from penstock.distributed import environment
from penstock.distributed.mesh import AXES, build_mesh
from penstock.errors import ConfigError
from tests.ranks import run_ranks


def groups_of(config: ParallelConfig) -> dict[str, tuple[int, ...]]:
    mesh = build_mesh(config, "cpu")
    assert build_mesh(config, "cpu") is mesh
    return {name: group.ranks for name, group in mesh.groups.items()}


def test_neighbours_share_the_innermost_axis() -> None:
    config = ParallelConfig(cfg_parallel_size=2, ulysses_degree=2, tensor_parallel_size=2)
    groups = run_ranks(8, groups_of, config)
    assert groups[0]["tensor"] == (0, 1)
    assert groups[0]["ulysses"] == groups[0]["sequence"] == (0, 2)
    assert groups[3]["ulysses"] == (1, 3)
    assert groups[0]["cfg"] == (0, 4)
    assert groups[5]["replica"] == groups[5]["world"] == tuple(range(8))


def test_a_sequence_goes_over_ring_and_ulysses_in_one_order() -> None:
    config = ParallelConfig(ring_degree=2, ulysses_degree=2, tensor_parallel_size=2)
    groups = run_ranks(8, groups_of, config)
    assert groups[0]["sequence"] == (0, 2, 4, 6)
    assert groups[1]["sequence"] == (1, 3, 5, 7)
    assert groups[0]["ring"] == (0, 4)


def test_tiles_may_have_more_ranks_than_the_denoiser() -> None:
    groups = run_ranks(4, groups_of, ParallelConfig(ulysses_degree=2, vae_patch_parallel_size=4))
    assert groups[0]["copies"] == (0, 2)
    assert groups[0]["vae"] == (0, 1, 2, 3)


def test_without_ranks_every_group_is_alone() -> None:
    mesh = build_mesh(ParallelConfig(), "cpu")
    assert mesh.device_mesh is None
    assert {mesh[axis].size for axis in AXES} == {1}


def test_the_error_prints_the_equation() -> None:
    with pytest.raises(ConfigError, match=r"cfg\(2\) \* ulysses\(2\) = 4 ranks, and one is running.*torchrun"):
        build_mesh(ParallelConfig(ulysses_degree=2, cfg_parallel_size=2), "cpu")


def mismatch() -> str:
    with pytest.raises(ConfigError) as caught:
        build_mesh(ParallelConfig(ulysses_degree=2), "cpu")
    return str(caught.value)


def test_a_wrong_world_says_what_to_try() -> None:
    assert run_ranks(4, mismatch)[0].startswith(
        "ulysses(2) = 2 is not world_size(4). Every rank needs its part: try --data-parallel-size 2."
    )


def timeouts_of(config: ParallelConfig, seconds: int) -> tuple[dict[str, float], int, list[str]]:
    """By group, how long it waits; how many torch has made; and the axes of torch's own mesh."""
    environment._timeout = timedelta(seconds=seconds)
    num_before = len(dist.distributed_c10d._world.pg_map)
    try:
        mesh = build_mesh(config, "cpu")
    finally:
        environment._timeout = environment._TIMEOUT
    found = {
        name: group.process_group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for name, group in mesh.groups.items()
        if group.process_group is not None and group.process_group is not dist.group.WORLD
    }
    assert mesh.device_mesh is not None and mesh.device == torch.device("cpu")
    for axis in mesh.device_mesh.mesh_dim_names or ():
        assert mesh.device_mesh[axis].get_group() is mesh[axis].process_group
    return found, len(dist.distributed_c10d._world.pg_map) - num_before, list(mesh.device_mesh.mesh_dim_names or ())


def test_every_group_has_the_time_out_of_the_ranks_and_none_is_made_for_nobody() -> None:
    sharded = {"use_hsdp": True, "hsdp_shard_size": 2, "hsdp_replicate_size": 2}
    config = ParallelConfig(cfg_parallel_size=2, ulysses_degree=2, **sharded)  # type: ignore[arg-type]
    for found, num_made, axes in run_ranks(4, timeouts_of, config, 123):
        assert found["cfg"] == found["ulysses"] == found["shard"] == 123
        assert set(found.values()) == {123}  # torch would give 30 minutes
        assert num_made == 3  # this rank's of cfg, ulysses and shard; the other axes have the same rows
        assert axes == ["cfg", "ulysses"]

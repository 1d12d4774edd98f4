"""The mesh in use and the names by which a rank asks for its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from penstock.config import ParallelConfig
from penstock.distributed import parallel_state
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from tests.ranks import run_ranks

GETTERS = sorted(
    name
    for name, value in vars(parallel_state).items()
    if name.startswith(("get_", "is_")) and not inspect.signature(value).parameters
)


@pytest.fixture(autouse=True)
def nothing_in_use() -> Iterator[None]:
    parallel_state.set_mesh(None)
    yield
    parallel_state.set_mesh(None)


@pytest.mark.parametrize("name", GETTERS)
def test_without_a_mesh_every_getter_raises(name: str) -> None:
    getter: Callable[[], Any] = getattr(parallel_state, name)
    with pytest.raises(RuntimeError, match=r"0 meshes are in use.*not initialised.*set_mesh"):
        getter()
    assert not parallel_state.model_parallel_is_initialized()


@pytest.mark.parametrize("name", GETTERS)
def test_in_a_single_process_every_getter_answers(name: str) -> None:
    mesh = build_mesh(ParallelConfig(), "cpu")
    parallel_state.set_mesh(mesh)
    assert parallel_state.get_mesh() is mesh
    answer = getattr(parallel_state, name)()
    if name.endswith("_rank"):
        assert answer == 0
    elif name.endswith("_world_size"):
        assert answer == 1


def test_a_call_brings_its_own_mesh() -> None:
    ours, others = (replace(build_mesh(ParallelConfig(), "cpu")) for _ in range(2))
    with parallel_state.using(ours):
        assert parallel_state.get_mesh() is ours
        assert parallel_state.is_in_call(ours) and not parallel_state.is_in_call(others)
        parallel_state.set_mesh(others)
        assert parallel_state.get_mesh() is ours and parallel_state.model_parallel_is_initialized()
        with pytest.raises(KeyError), parallel_state.using(others):
            assert parallel_state.get_mesh() is others
            raise KeyError
        assert parallel_state.get_mesh() is ours
    assert parallel_state.get_mesh() is others
    assert not parallel_state.is_in_call(others)
    parallel_state.set_mesh(None)
    with parallel_state.using(ours):
        assert parallel_state.model_parallel_is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def places(config: ParallelConfig) -> dict[str, Any]:
    parallel_state.set_mesh(build_mesh(config, "cpu"))
    values = {name: getattr(parallel_state, name)() for name in GETTERS}
    parallel_state.set_mesh(None)
    assert not parallel_state.model_parallel_is_initialized()
    return {
        name: value.ranks if name.endswith("_group") else value for name, value in values.items() if "mesh" not in name
    }


def test_ring_and_ulysses_make_one_sequence() -> None:
    told = run_ranks(4, places, ParallelConfig(ring_degree=2, ulysses_degree=2))
    assert [one["get_sequence_parallel_rank"] for one in told] == [0, 1, 2, 3]
    assert (
        [one["get_ulysses_rank"] for one in told] == [one["get_ulysses_parallel_rank"] for one in told] == [0, 1, 0, 1]
    )
    assert [one["get_ring_rank"] for one in told] == [one["get_ring_parallel_rank"] for one in told] == [0, 0, 1, 1]
    assert told[1]["get_sp_group"] == (0, 1, 2, 3)
    assert told[1]["get_ulysses_group"] == (0, 1)
    assert told[1]["get_ring_group"] == (1, 3)
    assert told[3]["get_ulysses_world_size"] == told[3]["get_ring_world_size"] == 2
    assert told[3]["get_sequence_parallel_world_size"] == 4


@pytest.mark.parametrize(
    ("outer", "inner", "outer_name", "inner_name"),
    [
        ("data_parallel_size", "tensor_parallel_size", "data_parallel", "tensor_model_parallel"),
        ("cfg_parallel_size", "pipeline_parallel_size", "classifier_free_guidance", "pipeline_parallel"),
    ],
)
def test_each_axis_has_its_own_name(outer: str, inner: str, outer_name: str, inner_name: str) -> None:
    told = run_ranks(4, places, ParallelConfig(**{outer: 2, inner: 2}))
    assert [one[f"get_{outer_name}_rank"] for one in told] == [0, 0, 1, 1]
    assert [one[f"get_{inner_name}_rank"] for one in told] == [0, 1, 0, 1]
    assert {one[f"get_{name}_world_size"] for one in told for name in (outer_name, inner_name)} == {2}
    assert [one["get_world_rank"] for one in told] == [0, 1, 2, 3]
    assert {one["get_world_size"] for one in told} == {4}
    assert {one["get_sequence_parallel_world_size"] for one in told} == {1}


def test_stages_know_their_ends() -> None:
    told = run_ranks(4, places, ParallelConfig(pipeline_parallel_size=4))
    assert [one["is_pipeline_first_stage"] for one in told] == [True, False, False, False]
    assert [one["is_pipeline_last_stage"] for one in told] == [False, False, False, True]


def test_both_generations_names_mean_the_same() -> None:
    told = run_ranks(4, places, ParallelConfig(cfg_parallel_size=2, tensor_parallel_size=2))
    for one in told:
        assert one["get_cfg_parallel_rank"] == one["get_classifier_free_guidance_rank"]
        assert one["get_tensor_parallel_rank"] == one["get_tensor_model_parallel_rank"]
        assert one["get_cfg_group"] != one["get_tp_group"]


def test_the_shard_group_is_the_one_that_weights_were_sharded_over_last() -> None:
    parallel_state.set_mesh(build_mesh(ParallelConfig(), "cpu"))
    assert parallel_state.get_fully_shard_group().ranks == (0,)
    parallel_state.set_shard_group(Group("shard", 1, (2, 3), None))
    try:
        parallel_state.set_mesh(None)  # its groups are its own
        assert parallel_state.get_fully_shard_world_size() == 2
        assert parallel_state.get_fully_shard_rank() == 1
    finally:
        parallel_state.set_shard_group(None)

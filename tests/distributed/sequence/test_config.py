"""The degrees of sequence parallelism, and their binding to the ranks that run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from penstock.config import ParallelConfig
from penstock.distributed import SequenceParallelConfig
from penstock.distributed.mesh import build_mesh
from penstock.distributed.parallel_state import set_mesh
from tests.ranks import run_ranks

GETTERS = ("rank", "world_size", "ulysses_rank", "ulysses_world_size", "ring_rank", "ring_world_size")


@pytest.fixture(autouse=True)
def nothing_in_use() -> Iterator[None]:
    set_mesh(None)
    yield
    set_mesh(None)


def test_defaults_split_nothing() -> None:
    config = SequenceParallelConfig()
    assert (config.ulysses_degree, config.ring_degree, config.convert_to_fp32) == (1, 1, True)
    assert config.sequence_parallel_size == 1
    assert not config.is_initialized()


def test_the_size_is_the_product() -> None:
    assert SequenceParallelConfig(2, 3).sequence_parallel_size == 6
    assert SequenceParallelConfig(ulysses_degree=2) == SequenceParallelConfig(2, 1, True)


@pytest.mark.parametrize("name", ["ulysses_degree", "ring_degree"])
@pytest.mark.parametrize("degree", [0, -2, 1.5, True, None])
def test_a_degree_is_a_whole_number_from_1_up(name: str, degree: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(degree))} is not a whole number from 1 up"):
        SequenceParallelConfig(**{name: degree})


@pytest.mark.parametrize("getter", GETTERS)
def test_without_parallel_state_getters_raise(getter: str) -> None:
    with pytest.raises(RuntimeError, match="not initialised"):
        getattr(SequenceParallelConfig(), f"get_{getter}")()


def test_without_parallel_state_setup_raises() -> None:
    config = SequenceParallelConfig()
    with pytest.raises(RuntimeError, match="not initialised"):
        config.setup(0, 1, torch.device("cpu"))
    assert not config.is_initialized()


def test_it_is_bound_as_long_as_its_mesh_is_in_use() -> None:
    set_mesh(build_mesh(ParallelConfig(), "cpu"))
    config = SequenceParallelConfig()
    config.setup(0, 1, torch.device("cpu"))
    assert config.is_initialized()
    set_mesh(build_mesh(ParallelConfig(), "cpu"))
    assert not config.is_initialized()
    set_mesh(None)
    assert not config.is_initialized()


def test_a_mesh_of_its_degrees_answers_for_it_without_setup() -> None:
    set_mesh(build_mesh(ParallelConfig(), "cpu"))
    assert SequenceParallelConfig().is_initialized()
    assert SequenceParallelConfig().get_ulysses_world_size() == 1


@pytest.mark.parametrize("getter", GETTERS)
def test_a_mesh_of_other_degrees_does_not(getter: str) -> None:
    set_mesh(build_mesh(ParallelConfig(), "cpu"))
    config = SequenceParallelConfig(ring_degree=2)
    assert not config.is_initialized()
    with pytest.raises(RuntimeError, match=r"ring_degree\(2\) is not the 1 of the mesh in use"):
        getattr(config, f"get_{getter}")()


def place(ulysses: int, ring: int, is_bound: bool) -> tuple[int, ...]:
    mesh = build_mesh(ParallelConfig(ulysses_degree=ulysses, ring_degree=ring), "cpu")
    set_mesh(mesh)
    config = SequenceParallelConfig(ulysses, ring)
    if is_bound:
        config.setup(mesh["world"].rank, 4, torch.device("cpu"))
    told = tuple(getattr(config, f"get_{getter}")() for getter in GETTERS)
    set_mesh(None)
    return told


@pytest.mark.parametrize("is_bound", [True, False])
@pytest.mark.parametrize(
    ("ulysses", "ring", "third"), [(4, 1, (3, 4, 3, 4, 0, 1)), (1, 4, (3, 4, 0, 1, 3, 4)), (2, 2, (3, 4, 1, 2, 1, 2))]
)
def test_every_rank_knows_its_place(ulysses: int, ring: int, third: tuple[int, ...], is_bound: bool) -> None:
    told = run_ranks(4, place, ulysses, ring, is_bound)
    assert [one[0] for one in told] == [0, 1, 2, 3]
    assert told[3] == third


def setup_error(ulysses: int, ring: int, rank_and_size: tuple[int, int] | None, device: str) -> str:
    mesh = build_mesh(ParallelConfig(cfg_parallel_size=2, ulysses_degree=2), "cpu")
    set_mesh(mesh)
    config = SequenceParallelConfig(ulysses, ring)
    try:
        config.setup(*(rank_and_size or (mesh["world"].rank, 4)), device)
    except ValueError as error:
        return str(error)
    finally:
        set_mesh(None)
    return ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4, 1, None, "cpu"),
            r"ulysses_degree\(4\) is not the 2 of the mesh .* cfg\(2\) \* ulysses\(2\).*ulysses_degree=2",
        ),
        ((2, 2, None, "cpu"), r"ring_degree\(2\) is not the 1 of the mesh"),
        (
            (2, 1, (5, 8), "cpu"),
            r"rank 5 of 8 is not this process: it is rank 0 of 4 in its world and 0 of 2 in its sequ",
        ),
        ((2, 1, None, "cuda:0"), r"device cuda:0 is not a cpu device"),
    ],
)
def test_a_mismatch_is_an_error(arguments: tuple[Any, ...], message: str) -> None:
    assert re.match(message, run_ranks(4, setup_error, *arguments)[0])


def setup_by_sequence() -> bool:
    mesh = build_mesh(ParallelConfig(cfg_parallel_size=2, ulysses_degree=2), "cpu")
    set_mesh(mesh)
    config = SequenceParallelConfig(2)
    config.setup(mesh["sequence"].rank, 2, "cpu")
    try:
        return config.is_initialized()
    finally:
        set_mesh(None)


def test_the_rank_may_be_the_one_in_the_sequence() -> None:
    assert run_ranks(4, setup_by_sequence) == [True] * 4

"""Neighbours: what ranks of one machine would each keep, they keep once, and it goes with them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from penstock.engine import neighbours
from penstock.engine.neighbours import Neighbours
from penstock.errors import ConfigError, WeightsError
from penstock.weights.memory import HostMemory
from penstock.weights.reader import FileReader
from tests.ranks import run_ranks

SIZE = 3 * 4096


def share(is_refused: bool, sizes: tuple[int, int]) -> tuple[int, int, Any, int]:
    """On every rank: its number among its neighbours, what it sees of what the first wrote, and its descriptors."""
    if is_refused:
        neighbours._opened = lambda path: None  # type: ignore[assignment]
    try:
        group = build_mesh(ParallelConfig(data_parallel_size=2), "cpu")["twin"]
        gc.collect()  # what earlier jobs of this rank left
        num_open = len(os.listdir("/proc/self/fd"))
        found, seen = Neighbours(group), None
        assert found.least_size == found.size
        with found.opened(sizes[group.rank]) as common:
            if common is not None:
                assert (common.rank, common.size) == (found.rank, found.size)
                memory = HostMemory(SIZE, file=common.file)
                if found.rank == 0:
                    memory.tensor[5000] = 77
                group.all_gather(torch.zeros(1))
                seen = int(memory.tensor[5000])
                del memory
                gc.collect()
        return found.rank, found.size, seen, len(os.listdir("/proc/self/fd")) - num_open
    finally:
        neighbours._opened = OPENED  # type: ignore[assignment]


OPENED = neighbours._opened


def test_neighbours_see_the_same_bytes_and_leave_nothing_open() -> None:
    assert run_ranks(2, share, False, (SIZE, SIZE)) == [(0, 2, 77, 0), (1, 2, 77, 0)]


def test_where_one_may_not_look_each_has_its_own() -> None:
    assert run_ranks(2, share, True, (SIZE, SIZE)) == [(0, 2, None, 0), (1, 2, None, 0)]


@pytest.mark.parametrize("sizes", [(SIZE, 0), (0, 0), (SIZE, 2 * SIZE)])
def test_ranks_that_would_not_keep_the_same_have_their_own(sizes: tuple[int, int]) -> None:
    assert run_ranks(2, share, False, sizes) == [(0, 2, None, 0), (1, 2, None, 0)]


def test_one_rank_has_no_neighbours() -> None:
    alone = Neighbours(Group("twin", 0, (0,), None))
    assert (alone.rank, alone.size, alone.least_size) == (0, 1, 1)


def test_without_linux_nobody_is_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    here = neighbours._machine()
    assert here == neighbours._machine()
    monkeypatch.setattr(neighbours, "_BOOT", Path("/nowhere"))
    assert neighbours._machine() != here
    monkeypatch.delattr(os, "memfd_create")
    assert neighbours._made(SIZE) is None


def test_a_file_of_nobody_is_not_opened() -> None:
    assert neighbours._opened(Path("/proc/0/fd/0")) is None


def load_copies(folder: Path) -> tuple[float, int, int, bool]:
    """On every rank of four: this process's part of the memory its shards take, and of what it read."""
    parallel = ParallelConfig(use_hsdp=True, hsdp_shard_size=2, hsdp_replicate_size=2)
    pipeline = penstock.load(folder, parallel=parallel, device="cpu", offload="sharded")
    placed = penstock.placed_on(pipeline)
    assert placed is not None and placed._streamer is not None and placed._streamer.store is not None
    store = placed._streamer.store
    total = int(store.tensor.sum(dtype=torch.int64))  # touch all of it
    placed.mesh["world"].all_gather(torch.zeros(1))
    lines = Path("/proc/self/smaps").read_text().split("\n")
    begin = next(number for number, line in enumerate(lines) if "memfd:penstock" in line)
    pss = next(int(line.split()[1]) * 1024 for line in lines[begin:] if line.startswith("Pss:"))
    placed.mesh["world"].all_gather(torch.zeros(1))
    read, is_right = placed.report().read_bytes, total > 0
    share = pss / store.tensor.numel()
    placed.remove()
    return share, read, store.num_sharers, is_right


def fail_to_read(folder: Path) -> str:
    """On every rank of four: what is said where one of them cannot read its part."""
    read = FileReader.read
    if torch.distributed.get_rank() == 1:

        def fail(self: FileReader, *_: Any) -> int:
            raise WeightsError("a byte is gone.")

        FileReader.read = fail  # type: ignore[method-assign]
    try:
        parallel = ParallelConfig(use_hsdp=True, hsdp_shard_size=2, hsdp_replicate_size=2)
        penstock.load(folder, parallel=parallel, device="cpu", offload="sharded")
    except (ConfigError, WeightsError) as error:
        return str(error)
    finally:
        FileReader.read = read  # type: ignore[method-assign]
    return ""


def test_a_part_that_one_rank_cannot_read_ends_all_at_once(zoo_folder: Callable[[str], Path]) -> None:
    said = run_ranks(4, fail_to_read, zoo_folder("flux"), timeout_s=60)
    assert said[1] == "a byte is gone."
    for rank in (0, 2, 3):
        assert said[rank] == "rank 1 of 4 cannot go on, and the others not without it: a byte is gone."


def test_copies_on_one_machine_take_memory_once(zoo_folder: Callable[[str], Path]) -> None:
    folder = zoo_folder("flux")
    ranks = run_ranks(4, load_copies, folder)
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert sum(read for _, read, _, _ in ranks) <= 1.05 * stored
    for share, _, num_sharers, is_right in ranks:
        assert num_sharers == 2 and is_right
        assert 0.4 < share < 0.6

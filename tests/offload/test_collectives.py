"""What ranks gather on CUDA, without CUDA: the order of launches, and units that are not those asked for."""

from __future__ import annotations

import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from penstock.errors import GenerationError
from penstock.offload.gather import GatherTransfer
from penstock.timeline import Timeline
from penstock.weights.memory import Arena
from penstock.weights.shards import ShardSource
from penstock.weights.sources import Part
from tests.offload.races import Collectives, Cuda
from tests.offload.rigs import PAGE, Sharer, rig_of, streaming
from tests.offload.toys import CPU, Scripted


def test_copies_after_a_cancelled_gathering_come_behind_it() -> None:
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    transfer = GatherTransfer(rig.transfer)
    source = ShardSource(Scripted([Part(64, 8, lambda _: None)]), Sharer(), PAGE)
    transfer.cancel(transfer.submit("first", source, 0))  # compute has not waited for it
    transfer.wait(transfer.submit("second", Scripted([Part(0, 8, lambda _: None)]), 0))
    transfer.close()
    assert rig.races == []


class Counting(Sharer):
    """A rank of several; each gathering is noted as a launch on the communicator of shards."""

    def __init__(self, collectives: Collectives, number: int) -> None:
        self.collectives, self.number = collectives, number

    def all_gather_into(self, whole: Any, own: Any, is_async: bool = False) -> None:
        self.collectives.launch(self.number, "shard")
        super().all_gather_into(whole, own)


class OnReaders(GatherTransfer):
    """What this design replaced: a thread gathers when a part has been read, beside what the calling thread does.

    Of the first rank the reads are over before a block exchanges, of the others only then.
    """

    def __init__(self, own: Any, timeline: Timeline | None) -> None:
        super().__init__(own, timeline)
        self.pool, self.work, self.exchanged = ThreadPoolExecutor(1), [], threading.Event()
        self.is_late = False

    def submit(self, name: str, source: Any, begin: int) -> Any:
        ticket = super().submit(name, source, begin)
        self.exchanged.clear()
        self.work.append(self.pool.submit(self._gather))
        return ticket

    def _gather(self) -> None:
        if self.is_late:
            self.exchanged.wait(10)
        super()._launch()

    def _launch(self) -> None:
        self.exchanged.set()
        self.work.pop(0).result()

    def exchange(self) -> None:
        """The calling thread is about to exchange, or has."""
        if not self.is_late:
            for work in self.work:
                work.result()


@pytest.mark.parametrize(
    ("gathering", "way"),
    [(GatherTransfer, way) for way in ("shards on it", "shards in store", "shards in files")]
    + [(OnReaders, "shards in files")],
)
def test_all_ranks_launch_collectives_in_one_order(gathering: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = Collectives()
    for rank in range(2):
        sharer = Counting(collectives, rank)
        with streaming(Cuda(), 1, way, monkeypatch, sharer, gathering) as (pipeline, made, _):
            transfer = made.transfer
            transfer.is_late = rank > 0

            def exchange(*_: Any, rank: int = rank, transfer: Any = transfer) -> None:
                if isinstance(transfer, OnReaders):
                    transfer.exchange()
                collectives.launch(rank, "ulysses")
                if isinstance(transfer, OnReaders):
                    transfer.exchanged.set()

            for block in pipeline.transformer.blocks:
                block.linear.register_forward_pre_hook(exchange)
            pipeline(num_steps=2)
    assert {"shard", "ulysses"} == set(collectives.order(0)) and len(collectives.order(0)) > 20
    if gathering is OnReaders:
        assert collectives.failures[0] == "ranks 0 and 1" and "threads of rank 0" in collectives.failures
    else:
        assert collectives.failures == []


def test_another_unit_than_was_asked_for_is_seen_later_and_before_the_picture_is_given_away() -> None:
    api = Cuda()
    rig = rig_of(api, Arena(8 * PAGE, CPU))
    transfer = GatherTransfer(rig.transfer)

    class Apart(Sharer):
        rank = 1  # the first one stamps

        def all_gather_into(self, whole: Any, own: Any, is_async: bool = False) -> None:
            super().all_gather_into(whole, own)
            rig.arena.tensor[:8].view(torch.int64).fill_(zlib.crc32(self.gathers.encode()))

    sharer = Apart()
    source = ShardSource(Scripted([]), sharer, PAGE)
    source.__class__ = type("AtZero", (ShardSource,), {"begin": 0})  # the toy's only rank has all of the unit
    api.is_busy = True
    for sharer.gathers in ("block 1", "block 1", "block 2"):  # type: ignore[attr-defined]
        ticket = transfer.submit("block 1", source, 0)
        transfer.wait(ticket)  # the device is not there yet, and the host does not wait
    assert "exchanges" not in api.host()
    with pytest.raises(GenerationError, match="this rank gathers block 1, and the first of those it shares with"):
        transfer.check_fills(is_waiting=True)
    transfer.check_fills(is_waiting=True)
    transfer.close()

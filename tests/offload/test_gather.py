"""Gathering: units that ranks have in parts come whole to every rank, in one order; threads stand in for ranks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch

from penstock.errors import GenerationError, WeightsError
from penstock.offload.gather import GatherTransfer
from penstock.offload.transfer import HostTransfer
from penstock.timeline import Timeline
from penstock.weights.host import HostStore
from penstock.weights.memory import Arena
from penstock.weights.ranges import PAGE_BYTES
from penstock.weights.shards import ShardSource
from penstock.weights.sources import Part, Source
from tests.offload.toys import CPU, Scripted

SIZE = 2 * PAGE_BYTES


class Meeting:
    """Where threads that stand in for ranks exchange parts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: dict[int, dict[int, torch.Tensor]] = {}  # by exchange and rank
        self.changed = threading.Condition()

    def rank(self, rank: int) -> Any:
        return Rank(self, rank)


class Rank:
    """Gathers as ranks do that send to each other: each exchange is begun, and waited for later."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.launched: list[int] = []  # threads
        self.num_waits = 0
        self.error: Exception | None = None

    def all_gather_into(self, whole: torch.Tensor, own: torch.Tensor, is_async: bool = False) -> Any:
        assert is_async
        number = len(self.launched)
        self.launched.append(threading.get_ident())
        with self.meeting.changed:
            self.meeting.parts.setdefault(number, {})[self.rank] = own.clone()
            self.meeting.changed.notify_all()
        return SimpleNamespace(wait=lambda: self._wait(number, whole))

    def _wait(self, number: int, whole: torch.Tensor) -> None:
        self.num_waits += 1
        if self.error is not None:
            raise self.error
        with self.meeting.changed:
            parts = self.meeting.parts[number]
            assert self.meeting.changed.wait_for(lambda: len(parts) == self.size, timeout=20)
        for rank, place in enumerate(whole.view(self.size, -1)):
            place.copy_(parts[rank])


def transfer_of(arena: Arena, timeline: Timeline | None = None) -> GatherTransfer:
    return GatherTransfer(HostTransfer(arena, timeline), timeline)


def part_of(unit: int, rank: int) -> Part:
    """Writes the unit's number to this rank's page, but not where rank 0 stamps it."""

    def write(memory: memoryview) -> None:
        memory[:] = bytes([10 * unit + rank]) * (PAGE_BYTES - 64)

    return Part(64, PAGE_BYTES - 64, write)


def together(size: int, run: Callable[[int, GatherTransfer, Arena, Any], Any]) -> list[Any]:
    """Run on every rank at once; what each returned or raised."""
    meeting, results = Meeting(size), [None] * size

    def main(rank: int) -> None:
        arena = Arena(4 * SIZE, CPU)
        transfer = transfer_of(arena, Timeline())
        try:
            results[rank] = run(rank, transfer, arena, meeting.rank(rank))
        except (GenerationError, WeightsError) as error:
            results[rank] = error  # type: ignore[call-overload]
        finally:
            transfer.close()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("is_stored", [True, False])
def test_every_rank_gets_every_part(is_stored: bool) -> None:
    def run(rank: int, transfer: GatherTransfer, arena: Arena, sharers: Any) -> tuple[list[int], int, int]:
        tickets = []
        store = HostStore(3 * PAGE_BYTES, is_pinned=False)
        owns: list[Source] = [Scripted([part_of(unit, rank)]) for unit in range(3)]
        if is_stored:
            owns = [store.put(own, PAGE_BYTES) for own in owns]
            store.finish()
        for unit, own in enumerate(owns):
            source = ShardSource(own, sharers, SIZE)
            tickets.append(transfer.submit(f"unit {unit}", source, unit * SIZE))
        assert not any(transfer.is_done(ticket) for ticket in tickets)
        before = arena.tensor._version
        for ticket in tickets:
            transfer.wait(ticket)
        assert arena.tensor._version == before  # whoever changes a weight is still seen to
        bytes_found = [int(arena.tensor[unit * SIZE + rank * PAGE_BYTES + 100]) for unit in range(3) for rank in (0, 1)]
        assert transfer.busy_s > 0
        return bytes_found, transfer.moved_bytes, len(transfer._timeline.spans)  # type: ignore[union-attr]

    moved = 3 * SIZE if is_stored else 3 * (SIZE - PAGE_BYTES + PAGE_BYTES - 64)
    spans = 3 if is_stored else 6
    assert together(2, run) == [([0, 1, 10, 11, 20, 21], moved, spans)] * 2


def test_ranks_that_gather_different_units_are_told() -> None:
    def run(rank: int, transfer: GatherTransfer, arena: Arena, sharers: Any) -> None:
        name = f"block {rank}"
        transfer.wait(transfer.submit(name, ShardSource(Scripted([part_of(rank, rank)]), sharers, SIZE), 0))

    first, second = together(2, run)
    assert first is None  # it is the one that the others are compared with
    assert isinstance(second, GenerationError)
    assert "this rank gathers block 1, and the first of those it shares with something else" in str(second)


def test_cancelling_lets_the_others_have_their_part() -> None:
    def run(rank: int, transfer: GatherTransfer, arena: Arena, sharers: Any) -> int:
        ticket = transfer.submit("unit", ShardSource(Scripted([part_of(3, rank)]), sharers, SIZE), 0)
        if rank == 0:
            transfer.cancel(ticket)
        else:
            transfer.wait(ticket)
        return int(arena.tensor[100])

    assert together(2, run) == [30, 30]


def failing() -> Source:
    def fail(memory: memoryview) -> None:
        raise WeightsError("1 byte is gone")

    return Scripted([Part(0, PAGE_BYTES, fail)])


def test_a_part_that_cannot_be_read_is_that_ranks_error() -> None:
    transfer, sharers = transfer_of(Arena(4 * SIZE, CPU)), Meeting(2).rank(0)
    first = transfer.submit("unit", ShardSource(failing(), sharers, SIZE), 0)
    second = transfer.submit("next", ShardSource(Scripted([part_of(1, 0)]), sharers, SIZE), SIZE)  # tells nobody
    for ticket in (first, second):
        with pytest.raises(WeightsError, match="1 byte is gone"):
            transfer.wait(ticket)
        transfer.cancel(ticket)
    assert not sharers.launched  # the others would take what comes next for this unit
    transfer.close()


def test_what_was_asked_for_is_counted_before_it_is_gathered() -> None:
    transfer, sharers = transfer_of(Arena(4 * SIZE, CPU)), Meeting(2).rank(0)
    transfer.submit("unit", ShardSource(Scripted([part_of(1, 0)]), sharers, SIZE), 0)
    assert not sharers.launched
    with pytest.raises(GenerationError, match="after 1 fills that it shares"):
        transfer.drain()


def test_an_exchange_that_failed_is_told_once() -> None:
    transfer, sharers = transfer_of(Arena(4 * SIZE, CPU)), Meeting(2).rank(0)
    sharers.error = RuntimeError("Connection closed by peer")
    ticket = transfer.submit("unit", ShardSource(Scripted([part_of(1, 0)]), sharers, SIZE), 0)
    with pytest.raises(RuntimeError, match="closed by peer"):
        transfer.wait(ticket)
    transfer.cancel(ticket)
    transfer.close()
    assert sharers.num_waits == 1


def test_the_calling_thread_launches_in_the_order_in_which_units_are_asked_for() -> None:
    """Also where the reads of the first are over last: whether they are never decides."""
    late = threading.Event()

    def read(memory: memoryview) -> None:
        late.wait(20)

    transfer, sharers = transfer_of(Arena(4 * SIZE, CPU)), Meeting(1).rank(0)
    first = transfer.submit("first", ShardSource(Scripted([Part(64, 8, read)]), sharers, SIZE), 0)
    assert len(sharers.launched) == 0  # its reads have until the next unit is asked for
    late.set()
    second = transfer.submit("second", ShardSource(Scripted([part_of(1, 0)]), sharers, SIZE), SIZE)
    assert len(sharers.launched) == 1
    transfer.wait(second)
    assert len(sharers.launched) == 2
    store = HostStore(PAGE_BYTES, is_pinned=False)
    stored = store.put(Scripted([part_of(2, 0)]), PAGE_BYTES)
    store.finish()
    third = transfer.submit("third", ShardSource(stored, sharers, PAGE_BYTES), 2 * SIZE)
    assert len(sharers.launched) == 3  # it is in memory, and gathered while others compute
    transfer.wait(third)
    transfer.wait(first)
    assert set(sharers.launched) == {threading.get_ident()}
    transfer.close()


def test_closing_brings_what_the_others_count_on() -> None:
    def run(rank: int, transfer: GatherTransfer, arena: Arena, sharers: Any) -> int:
        ticket = transfer.submit("unit", ShardSource(Scripted([part_of(3, rank)]), sharers, SIZE), 0)
        if rank == 0:
            transfer.close()
        else:
            transfer.wait(ticket)
        return int(arena.tensor[100])

    assert together(2, run) == [30, 30]


def test_a_transfer_that_is_only_forgotten_keeps_neither_its_memory_nor_a_thread() -> None:
    alone, transfer = Meeting(1).rank(0), transfer_of(Arena(4 * SIZE, CPU))
    transfer.wait(transfer.submit("unit", ShardSource(Scripted([part_of(1, 0)]), alone, SIZE), 0))
    kept, memory = ref(transfer), ref(transfer._own._view)  # type: ignore[attr-defined]
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("penstock-reader")]
    assert readers
    del transfer
    gc.collect()
    for thread in readers:
        thread.join(10)
        assert not thread.is_alive()
    gc.collect()
    assert kept() is None and memory() is None


def test_whole_units_are_read_as_ever() -> None:
    arena = Arena(4 * SIZE, CPU)
    transfer = transfer_of(arena)
    ticket = transfer.submit("unit", Scripted([part_of(1, 0)]), 0)
    transfer.wait(ticket)
    assert transfer.is_done(ticket)
    assert int(arena.tensor[100]) == 10 and transfer.moved_bytes == PAGE_BYTES - 64
    transfer.cancel(transfer.submit("unit", Scripted([part_of(1, 0)]), 0))
    transfer.drain()  # nothing was shared
    transfer.restart()
    transfer.close()

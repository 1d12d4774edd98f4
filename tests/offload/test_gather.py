"""Gathering: units that ranks have in parts come whole to every rank, in one order; threads stand in for ranks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch

from penstock.errors import GenerationError, WeightsError
from penstock.offload import gather
from penstock.offload.gather import GatherTransfer
from penstock.timeline import Timeline
from penstock.waits import current_wait
from penstock.weights.host import HostStore
from penstock.weights.memory import Arena
from penstock.weights.ranges import PAGE_BYTES
from penstock.weights.shards import ShardSource
from penstock.weights.sources import Part, Source
from tests.offload.toys import CPU, Scripted
from tests.waiting import has_ended, threads_of, wait_until

SIZE = 2 * PAGE_BYTES


class Meeting:
    """Where threads that stand in for ranks exchange parts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def rank(self, rank: int) -> Any:
        return Rank(self, rank)


class Rank:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank
        self.size = meeting.size

    def all_gather_into(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        self.meeting.parts[self.rank] = own
        self.meeting.barrier.wait()
        for part, place in zip(self.meeting.parts, whole.view(self.size, -1), strict=True):
            assert part is not None
            if part.data_ptr() != place.data_ptr():
                place.copy_(part)
        self.meeting.barrier.wait()


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
        transfer = GatherTransfer(arena, Timeline())
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


def test_a_part_that_cannot_be_read_is_that_ranks_error() -> None:
    def fail(memory: memoryview) -> None:
        raise WeightsError("1 byte is gone")

    arena = Arena(4 * SIZE, CPU)
    transfer = GatherTransfer(arena)
    source = ShardSource(Scripted([Part(0, PAGE_BYTES, fail)]), Meeting(2).rank(0), SIZE)
    with pytest.raises(WeightsError, match="1 byte is gone"):
        transfer.wait(transfer.submit("unit", source, 0))
    with pytest.raises(GenerationError, match="after 1 fills that it shares"):
        transfer.drain()
    transfer.close()


def test_transfers_of_one_group_share_its_thread_and_the_last_ends_it() -> None:
    alone = Meeting(1).rank(0)
    transfers = [GatherTransfer(Arena(4 * SIZE, CPU)) for _ in range(2)]
    for transfer in transfers:
        transfer.wait(transfer.submit("unit", ShardSource(Scripted([part_of(1, 0)]), alone, SIZE), 0))
    assert len(threads()) == 1
    transfers[0].close()
    assert len(threads()) == 1
    transfers[1].close()
    assert has_ended("penstock-gather")


@pytest.mark.parametrize("num_closed", [0, 1])
def test_a_transfer_that_is_only_forgotten_keeps_neither_its_memory_nor_the_thread(num_closed: int) -> None:
    alone = Meeting(1).rank(0)
    transfers = [GatherTransfer(Arena(4 * SIZE, CPU)) for _ in range(2)]
    for transfer in transfers:
        transfer.wait(transfer.submit("unit", ShardSource(Scripted([part_of(1, 0)]), alone, SIZE), 0))
    kept, memory = ref(transfers[1]), ref(transfers[1]._view)
    del transfer
    for _ in range(num_closed):
        transfers.pop(0).close()
    transfers.clear()
    alone.meeting.parts.clear()
    wait_until(lambda: gc.collect() >= 0 and not threads() and memory() is None)  # the thread lets go a moment later
    assert kept() is None


def threads() -> set[str]:
    return threads_of("penstock-gather")


def test_whole_units_are_read_as_ever() -> None:
    arena = Arena(4 * SIZE, CPU)
    transfer = GatherTransfer(arena)
    ticket = transfer.submit("unit", Scripted([part_of(1, 0)]), 0)
    transfer.wait(ticket)
    assert transfer.is_done(ticket)
    assert int(arena.tensor[100]) == 10 and transfer.moved_bytes == PAGE_BYTES - 64
    transfer.cancel(transfer.submit("unit", Scripted([part_of(1, 0)]), 0))
    transfer.drain()  # nothing was shared
    transfer.restart()
    transfer.close()


class Noticed(Future[None]):
    """Work that tells when it is waited for; by whatever means, it asks whether it is done."""

    def __init__(self, work: Future[None], tell: Callable[[], None]) -> None:
        super().__init__()
        self.tell = tell
        work.add_done_callback(lambda _: self.set_result(None))

    def result(self, timeout: float | None = None) -> None:
        self.tell()
        super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.tell()
        return super().exception(timeout)


@pytest.mark.parametrize("how", ["wait", "cancel", "close"])
def test_who_waits_for_a_gathering_is_seen_to_wait(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever watches over ranks, though it is another thread that exchanges."""

    def run(rank: int, transfer: GatherTransfer, arena: Arena, sharers: Any) -> list[bool]:
        seen: list[bool] = []

        def look() -> None:
            seen.append(current_wait(threading.get_ident()) is not None)

        ticket = transfer.submit("unit", ShardSource(Scripted([part_of(3, rank)]), sharers, SIZE), 0)
        look()
        if how == "close":
            transfer.close()
        else:
            getattr(transfer, how)(replace(ticket, work=Noticed(ticket.work, look)))
        look()
        return seen

    def wait_noted(futures: Any) -> None:
        seen_at_close.append(current_wait(threading.get_ident()) is not None)
        wait(futures)

    seen_at_close: list[bool] = []
    monkeypatch.setattr(gather, "wait", wait_noted)
    assert together(2, run) == [[False, True, False] if how != "close" else [False, False]] * 2
    assert all(seen_at_close) and len(seen_at_close) >= 2

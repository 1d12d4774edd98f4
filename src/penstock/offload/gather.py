"""Transfers of sharded weights on the CPU: each rank brings its part of a unit, then all gather it into its place.

One thread for each group of ranks gathers, in the order in which units are asked for, whichever pipelines these belong
to, so that all ranks gather the same unit at the same time, whatever their disks and their compute do. Owns that order;
which unit is due, all ranks decide alike elsewhere.
"""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch

from penstock.errors import GenerationError
from penstock.offload.transfer import HostTransfer, Ticket, require_alone
from penstock.timeline import Timeline
from penstock.waits import noted
from penstock.weights.host import StoredSource
from penstock.weights.memory import Arena
from penstock.weights.shards import ShardSource, Sharers
from penstock.weights.sources import Source

_LANE = "gathering"
_THREADS: WeakValueDictionary[Sharers, _Thread] = WeakValueDictionary()  # by group, while a transfer holds it
_STAMP_BYTES = 8
"""At a unit's begin, where no weight lies: the first rank writes there which unit it gathers."""


class _Thread:
    """The thread of one group of ranks, and the transfers that use it.

    It ends with the last of them, closed or only forgotten: its pool's thread lives no longer than the pool.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="penstock-gather")
        self.users: WeakSet[GatherTransfer] = WeakSet()


class GatherTransfer:
    """Fills units whose bytes several ranks have in parts.

    Args:
        arena: in host memory.
        timeline: where fills are noted, or None.
    """

    is_seen_by_torch = False
    num_lanes = 1

    def __init__(self, arena: Arena, timeline: Timeline | None = None) -> None:
        assert arena.host is not None
        self._own = HostTransfer(arena, timeline)
        self._view = arena.host.view
        with torch.inference_mode(False):
            self._memory = torch.frombuffer(arena.host.view, dtype=torch.uint8)  # torch counts its writes apart
        self._timeline = timeline
        self._under_way: list[Future[None]] = []
        self._threads: dict[Sharers, _Thread] = {}
        self._names: dict[int, str] = {}  # by what rank 0 stamps units with
        self._num_shared = 0
        self._received_bytes = 0
        self._gather_s = 0.0

    @property
    def moved_bytes(self) -> int:
        """Bytes written to the device: this rank's parts that were read straight to it, and what was gathered."""
        return self._own.moved_bytes + self._received_bytes

    @property
    def busy_s(self) -> float:
        """Seconds of gathering, waits for other ranks included."""
        return self._gather_s

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Queue this rank's part, and the gathering behind it."""
        if not isinstance(source, ShardSource):
            return self._own.submit(name, source, begin)
        self._num_shared += 1
        reading = None
        if not isinstance(source.own, StoredSource):
            reading = self._own.submit(name, source.own, begin + source.begin)
        number = zlib.crc32(name.encode())
        self._names[number] = name
        gathering = self._thread_of(source.sharers).submit(self._gather, number, source, begin, reading)
        self._under_way = [*(future for future in self._under_way if not future.done()), gathering]
        return Ticket(name, gathering, is_shared=True)

    def wait(self, ticket: Ticket) -> None:
        """Wait for the gathering."""
        if ticket.is_shared:
            with noted():  # what the gathering thread waits for
                ticket.work.result()
        else:
            self._own.wait(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Let what was asked for come: the other ranks count on it."""
        if ticket.is_shared:
            with noted():
                ticket.work.exception()
        else:
            self._own.cancel(ticket)

    def is_done(self, ticket: Ticket) -> bool:
        """False for a gathering, until it was waited for: ranks would see it end at different times."""
        return not ticket.is_shared and self._own.is_done(ticket)

    def drain(self) -> None:
        """What Ctrl-C ended half way cannot be taken up again: nobody knows how far the other ranks are.

        Raises:
            GenerationError: where anything was gathered.
        """
        require_alone(self._num_shared)
        self._own.drain()

    def restart(self) -> None:
        """In a child process, which shares no group of ranks: it can read, not gather."""
        self._own.restart()

    def close(self) -> None:
        """Let what was asked for come, which the other ranks count on; then end the threads that nobody uses."""
        with noted():
            wait(self._under_way)
        while self._threads:
            sharers, thread = self._threads.popitem()
            thread.users.discard(self)
            if not thread.users:
                _THREADS.pop(sharers, None)
                thread.pool.shutdown(wait=True)
        self._own.close()

    def _thread_of(self, sharers: Sharers) -> ThreadPoolExecutor:
        """The thread that gathers for a group."""
        if sharers not in self._threads:
            self._threads[sharers] = _THREADS.setdefault(sharers, _Thread())
            self._threads[sharers].users.add(self)
        return self._threads[sharers].pool

    def _gather(self, number: int, source: ShardSource, begin: int, reading: Ticket | None) -> None:
        """Runs on the gathering thread."""
        whole = self._memory[begin : begin + source.num_bytes]
        if reading is not None:
            self._own.wait(reading)
            own = whole[source.begin : source.begin + source.part_bytes]
        else:
            own = _stored(source)
        begun_s = time.perf_counter()
        if source.sharers.rank == 0:
            own[:_STAMP_BYTES] = torch.frombuffer(bytearray(number.to_bytes(_STAMP_BYTES)), dtype=torch.uint8)
        source.sharers.all_gather_into(whole, own)
        ended_s = time.perf_counter()
        found = int.from_bytes(self._view[begin : begin + _STAMP_BYTES])
        if found != number:
            raise GenerationError(_apart(self._names[number], self._names.get(found, "something else")))
        self._received_bytes += source.num_bytes - (source.part_bytes if reading is not None else 0)
        self._gather_s += ended_s - begun_s
        if self._timeline is not None:
            self._timeline.add("fill", self._names[number], begun_s, ended_s, lane=_LANE, num_bytes=source.num_bytes)


def _stored(source: ShardSource) -> torch.Tensor:
    stored: Any = source.own
    memory: torch.Tensor = stored.memory
    return memory


def _apart(name: str, other: str) -> str:
    return (
        f"this rank gathers {name}, and the first of those it shares with {other}: their calls run different blocks, "
        "and the weights would be mixed up. Shard over ranks whose calls are alike: with --cfg-parallel-size C, give "
        "--hsdp-replicate-size C. Where another pipeline over these ranks has failed, call remove() on that one first."
    )

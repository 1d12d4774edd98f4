"""Transfers: how a source's bytes get to a unit's place on the device, beside compute.

One interface, two ways: threads of the host, where the device's memory is the host's; a copy stream, on CUDA
(`penstock.offload.cuda`). Owns threads and tickets; does not know which unit is due.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.errors import GenerationError
from penstock.timeline import Timeline
from penstock.weights.memory import Arena
from penstock.weights.sources import Part, Source

THREADS = 2
"""Readers at a time: two reach a disk's full speed, and more only wait for each other."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A fill that was asked for.

    Attributes:
        name: of the unit.
        work: what does it.
        is_shared: whether other ranks count on it.
    """

    name: str
    work: Any
    is_shared: bool = False


def require_alone(num_shared: int) -> None:
    """Refuse to take up again what was interrupted half way where other ranks take part.

    Raises:
        GenerationError: where any fills were shared.
    """
    if num_shared:
        raise GenerationError(
            f"a run was interrupted on this rank after {num_shared} fills that it shares with others, which may be "
            "elsewhere in it. Start the ranks again."
        )


class Transfer(Protocol):
    """Moves bytes to the device.

    Attributes:
        num_lanes: how many fill side by side.
        is_seen_by_torch: whether torch's counter of writes to the arena counts its writes.
    """

    num_lanes: int
    is_seen_by_torch: bool

    @property
    def moved_bytes(self) -> int:
        """Bytes written to the device so far."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds of filling."""
        ...

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Begin to fill the arena from byte `begin`; everything that compute was given so far may still read it."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """What compute is given from now on may read the bytes.

        Raises:
            WeightsError: for what a reader met.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Give a fill up; afterwards nothing writes to its place any more."""
        ...

    def is_done(self, ticket: Ticket) -> bool:
        """Whether giving a fill up would interrupt nobody."""
        ...

    def drain(self) -> None:
        """Give up all fills, those included whose tickets were lost."""
        ...

    def restart(self) -> None:
        """Begin anew in a process that inherited no threads."""
        ...

    def close(self) -> None:
        """End threads and streams."""
        ...


class HostTransfer:
    """Threads that write straight into the arena.

    Args:
        arena: in host memory.
        timeline: where fills are noted, or None.
        num_threads: how many read at a time.
    """

    is_seen_by_torch = False

    def __init__(self, arena: Arena, timeline: Timeline | None = None, num_threads: int = THREADS) -> None:
        assert arena.host is not None
        self._view = arena.host.view
        self._timeline = timeline
        self._pool = _readers(num_threads)
        self._lock = threading.Lock()
        self.moved_bytes = 0
        self.num_lanes = num_threads
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds that readers took, summed over threads."""
        return self._busy_s

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Queue the source's parts; readers take them in order."""
        futures = [self._pool.submit(self._fill, name, part, begin) for part in source.parts]
        return Ticket(name, futures)

    def wait(self, ticket: Ticket) -> None:
        """Wait for the readers."""
        for future in ticket.work:
            future.result()

    def cancel(self, ticket: Ticket) -> None:
        """Drop the parts that no reader has taken, and wait for the others."""
        wait([future for future in ticket.work if not future.cancel()])

    def is_done(self, ticket: Ticket) -> bool:
        """Whether all parts are written."""
        return all(future.done() for future in ticket.work)

    def drain(self) -> None:
        """Drop what is queued, wait for what runs, and go on with fresh threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = _readers(self.num_lanes)

    def restart(self) -> None:
        """Fresh threads and locks."""
        self._lock = threading.Lock()
        self._pool = _readers(self.num_lanes)

    def close(self) -> None:
        """End the threads; what is queued is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, name: str, part: Part, begin: int) -> None:
        begun_s = time.perf_counter()
        before, after = part.margin
        first = begin + part.position
        part.write(self._view[first - before : first + part.num_bytes + after])
        ended_s = time.perf_counter()
        with self._lock:
            self.moved_bytes += part.num_bytes
            self._busy_s += ended_s - begun_s
        if self._timeline is not None:
            lane = threading.current_thread().name
            self._timeline.add("fill", name, begun_s, ended_s, lane=lane, num_bytes=part.num_bytes)


def _readers(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="penstock-reader")

"""Transfers: how a source's bytes get to a unit's place on the device, beside compute.

One interface, two ways: threads of the host, where the device's memory is the host's; a copy stream, on CUDA
(`penstock.offload.cuda`). Owns threads and tickets; does not know which unit is due.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from penstock.errors import GenerationError
from penstock.offload.timing import Clock, HostClock, Tell
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
    """Moves bytes to the device."""

    @property
    def clock(self) -> Clock:
        """Measures what the device does."""
        ...

    @property
    def is_seen_by_torch(self) -> bool:
        """Whether torch's counter of writes to the arena counts its writes."""
        ...

    @property
    def moved_bytes(self) -> int:
        """Bytes written to the device so far."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds of filling, those of readers that work side by side added up."""
        ...

    @property
    def lane_s(self) -> float:
        """Seconds of filling, those of readers that work side by side counted once."""
        ...

    @property
    def unpinned_bytes(self) -> int:
        """Bytes of its host memory that CUDA refused to pin."""
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


class Device(Transfer, Protocol):
    """Moves bytes to the device, and gives it what ranks exchange there.

    Attributes:
        device: the arena's.
    """

    device: torch.device

    def place(self, begin: int, num_bytes: int) -> torch.Tensor:
        """Bytes of the arena."""
        ...

    def occupy(self) -> Any:
        """This moment: all that compute was given so far may still read the place that is to be filled."""
        ...

    def launch(self, free: Any, own: Ticket | None, exchange: Callable[[], Any], tell: Tell) -> Any:
        """Begin an exchange on this thread, behind what this rank brings itself.

        Args:
            free: what `occupy` returned.
            own: the fill of this rank's part; None where it is there. The host waits for its reads.
            exchange: begins it; returns what to wait for, or None.
            tell: is told when it took place.

        Returns:
            What `join`, `let_end` and `has_ended` take.
        """
        ...

    def join(self, launched: Any) -> None:
        """What compute is given from now on may read what was exchanged."""
        ...

    def let_end(self, launched: Any) -> None:
        """Nothing that fills the same place later comes before its end; whether it works is not asked."""
        ...

    def has_ended(self, launched: Any, is_waiting: bool = False) -> bool:
        """Whether it is over on the device; `is_waiting` for it, so that it is."""
        ...

    def seen(self, name: str, stamp: torch.Tensor) -> torch.Tensor:
        """A unit's number as the host can read it once the exchange that brings it has ended."""
        ...


class _Launched:
    """An exchange that the host has begun.

    Attributes:
        work: what to wait for; None once that was done.
    """

    def __init__(self, work: Any, begun_s: float, tell: Tell) -> None:
        self.work = work
        self.begun_s = begun_s
        self.tell: Tell | None = tell


class HostTransfer:
    """Threads that write straight into the arena.

    Args:
        arena: in host memory.
        timeline: where fills are noted, or None.
        num_threads: how many read at a time.
    """

    is_seen_by_torch = False
    unpinned_bytes = 0

    def __init__(self, arena: Arena, timeline: Timeline | None = None, num_threads: int = THREADS) -> None:
        assert arena.host is not None
        self.device = arena.tensor.device
        self.clock: Clock = HostClock()
        self._view = arena.host.view
        with torch.inference_mode(False):
            self._memory = torch.frombuffer(arena.host.view, dtype=torch.uint8)  # torch counts its writes apart
        self._joined_s = 0.0
        self._timeline = timeline
        self._pool = _readers(num_threads)
        self._lock = threading.Lock()
        self.moved_bytes = 0
        self._num_threads = num_threads
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """Seconds that readers took, summed over threads."""
        return self._busy_s

    @property
    def lane_s(self) -> float:
        """Seconds that readers took, divided among them."""
        return self._busy_s / self._num_threads

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
        self._pool = _readers(self._num_threads)

    def restart(self) -> None:
        """Fresh threads and locks."""
        self._lock = threading.Lock()
        self._pool = _readers(self._num_threads)

    def close(self) -> None:
        """End the threads; what is queued is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def place(self, begin: int, num_bytes: int) -> torch.Tensor:
        """Bytes of the arena; writes to them are not counted as changes of weights."""
        return self._memory[begin : begin + num_bytes]

    def occupy(self) -> None:
        """Compute is over when the host is."""

    def launch(self, free: None, own: Ticket | None, exchange: Callable[[], Any], tell: Tell) -> _Launched:
        """Wait for this rank's reads, and begin."""
        if own is not None:
            self.wait(own)
        return _Launched(exchange(), time.perf_counter(), tell)

    def join(self, launched: _Launched) -> None:
        """Wait for the exchange; its seconds begin where those of the one before it end."""
        work, launched.work = launched.work, None
        tell, launched.tell = launched.tell, None
        if work is not None:
            work.wait()
        if tell is not None:
            begun_s, self._joined_s = max(launched.begun_s, self._joined_s), time.perf_counter()
            tell(begun_s, self._joined_s)

    def let_end(self, launched: _Launched) -> None:
        """Wait for the exchange; where it fails, another one tells."""
        with contextlib.suppress(RuntimeError):
            self.join(launched)

    def has_ended(self, launched: _Launched, is_waiting: bool = False) -> bool:
        """Whether it was waited for."""
        if is_waiting:
            self.join(launched)
        return launched.tell is None

    def seen(self, name: str, stamp: torch.Tensor) -> torch.Tensor:
        """The number itself."""
        return stamp

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

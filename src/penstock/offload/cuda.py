"""Transfers on CUDA: a copy stream beside the compute stream, ordered by events; the host waits for neither.

Weights in the host store move with one copy per unit. Weights in files go through a ring of pinned chunks, filled by
reader threads and copied chunk by chunk. What ranks gather comes on a stream of its own, so that it does not stand
behind copies of a later unit, which wait for their place. The arena lives as long as the transfers, so that no
allocator needs to be told which stream uses it.

Source: the CUDA programming guide on streams and events; the ready and free events of Lightricks' block streaming.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from penstock.offload.chunks import Chunks, Group, groups
from penstock.offload.timing import Clock, EventClock, Tell
from penstock.offload.transfer import THREADS, Ticket
from penstock.timeline import Timeline
from penstock.weights.host import StoredSource
from penstock.weights.memory import Arena, HostMemory, take_device
from penstock.weights.ranges import PAGE_BYTES
from penstock.weights.sources import Source

_LANE = "copy stream"
_NUMBER_BYTES = 8


class _Reading:
    """A fill from files, while readers are at it.

    Its copies come on the stream behind all those of the fill before it: they wait there for their own place, and a
    copy of an earlier unit would wait for that place as well.

    Attributes:
        work: of the readers.
        before: set once the fill before this one is on the stream.
        is_over: set once this one is.
    """

    def __init__(self, free: Any, before: threading.Event) -> None:
        self.free = free
        self.before = before
        self.is_over = threading.Event()
        self.work: list[Future[None]] = []
        self.num_left = 0
        self.is_begun = False


class CudaTransfer:
    """Copies to a CUDA device.

    Args:
        arena: on the device.
        timeline: where fills are noted, or None.
        api: `torch.cuda`, or what a test puts in its place.
        make_memory: makes pinned memory of so many bytes; for the arena's device if left out.
        num_threads: how many read at a time.
    """

    is_seen_by_torch = True

    def __init__(
        self,
        arena: Arena,
        timeline: Timeline | None = None,
        api: Any = torch.cuda,
        make_memory: Callable[[int], HostMemory] | None = None,
        num_threads: int = THREADS,
    ) -> None:
        self._arena = arena
        self._timeline = timeline
        self._api = api
        self.device: torch.device = arena.tensor.device
        self._copies = api.Stream(device=self.device)
        self._exchanges = api.Stream(device=self.device)
        self.clock: Clock = EventClock(self.device, api)
        if timeline is not None:
            timeline.late(self.clock.settle)
        self._make_memory = make_memory or partial(HostMemory, is_pinned=True, device=self.device)
        self._chunks: Chunks | None = None
        self._seen: dict[str, torch.Tensor] = {}  # by unit: where the host sees which one was gathered
        self._pages: list[HostMemory] = []
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._begin()
        self._copy_s = self._read_s = 0.0
        self.moved_bytes = 0

    def _begin(self) -> None:
        """Fresh readers. A thread's current device is the first one, whichever the process uses."""
        self._pool = ThreadPoolExecutor(
            self._num_threads,
            thread_name_prefix="penstock-reader",
            initializer=take_device,
            initargs=(self.device, self._api),
        )
        self._last = threading.Event()
        self._last.set()

    @property
    def busy_s(self) -> float:
        """Seconds of copies from the store and of reads, summed over readers; waits for the copies begun so far."""
        self.clock.settle()
        return self._copy_s + self._read_s

    @property
    def lane_s(self) -> float:
        """The same, readers side by side counted once."""
        self.clock.settle()
        return self._copy_s + self._read_s / self._num_threads

    @property
    def unpinned_bytes(self) -> int:
        """Bytes that CUDA refused to pin, of chunks."""
        return sum(memory.unpinned_bytes for memory in (*self._pages, *(self._chunks.memories if self._chunks else ())))

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Order the copies behind all that the compute stream was given so far."""
        free = self.occupy()
        if isinstance(source, StoredSource):
            self._copies.wait_event(free)
            begun = self.clock.mark(self._copies)
            self._copy(source.memory, begin)
            ready = self.clock.mark(self._copies)
            self.clock.between(begun, ready, partial(self._copied, name, source.memory.numel()))
            return Ticket(name, (None, ready))
        ready = self._api.Event()
        return Ticket(name, (self._read(name, groups(source.parts), begin, (free, ready)), ready))

    def wait(self, ticket: Ticket) -> None:
        """Let the compute stream wait; the host waits only for reads that are late."""
        ready = self._arrived(ticket)
        self._api.current_stream(self.device).wait_event(ready)

    def _arrived(self, ticket: Ticket) -> Any:
        """The event behind a fill's copies, once all of them are on the stream."""
        reading, ready = ticket.work
        for work in reading.work if reading is not None else ():
            work.result()
        if reading is not None:
            reading.is_over.wait()
        return ready

    def cancel(self, ticket: Ticket) -> None:
        """Let what was begun finish; copies of later fills come behind it on the stream anyway."""
        reading, ready = ticket.work
        if reading is not None:
            self._give_up(reading, ready)

    def _give_up(self, reading: _Reading, ready: Any) -> None:
        for work in reversed(reading.work):  # the last first: a reader takes none meanwhile
            if work.cancel():
                self._finish(reading, ready)
        for work in reading.work:
            if not work.cancelled():
                work.exception()

    def is_done(self, ticket: Ticket) -> bool:
        """Whether no reader is at it; copies that were begun are followed by later ones on their stream."""
        reading, _ = ticket.work
        return reading is None or all(work.done() for work in reading.work)

    def drain(self) -> None:
        """Drop what is queued, and wait for the readers; the stream keeps copies in order."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._begin()

    def restart(self) -> None:
        """CUDA does not survive a fork: torch refuses the child's next call with its own advice."""

    def close(self) -> None:
        """End the readers and wait for the copies."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._copies.synchronize()
        self._exchanges.synchronize()
        self.clock.settle()
        for memory in self._pages:
            memory.close()
        if self._chunks is not None:
            self._chunks.close()

    def place(self, begin: int, num_bytes: int) -> torch.Tensor:
        """Bytes of the arena."""
        return self._arena.tensor[begin : begin + num_bytes]

    def occupy(self) -> Any:
        """An event behind all that the compute stream was given so far."""
        free = self._api.Event()
        free.record(self._api.current_stream(self.device))
        return free

    def launch(self, free: Any, own: Ticket | None, exchange: Callable[[], Any], tell: Tell) -> Any:
        """Begin on a stream of its own, behind this rank's copies; the host waits for reads that are late.

        Returns:
            The event behind it.
        """
        self._exchanges.wait_event(free if own is None else self._arrived(own))
        begun = self.clock.mark(self._exchanges)
        with self._api.stream(self._exchanges):
            exchange()
        ready = self.clock.mark(self._exchanges)
        self.clock.between(begun, ready, tell)
        return ready

    def join(self, launched: Any) -> None:
        """Let the compute stream wait."""
        self._api.current_stream(self.device).wait_event(launched)

    def let_end(self, launched: Any) -> None:
        """Let copies wait: compute does not, and a later fill of the place begins with them."""
        self._copies.wait_event(launched)

    def has_ended(self, launched: Any, is_waiting: bool = False) -> bool:
        """Whether the device is past it."""
        if is_waiting:
            launched.synchronize()
        return is_waiting or bool(launched.query())

    def seen(self, name: str, stamp: torch.Tensor) -> torch.Tensor:
        """Pinned memory that the number is copied to, on the current stream."""
        if name not in self._seen:
            place = len(self._seen) % (PAGE_BYTES // _NUMBER_BYTES)
            if not place:
                self._pages.append(self._make_memory(PAGE_BYTES))
            self._seen[name] = self._pages[-1].tensor.view(torch.int64)[place]
        self._seen[name].copy_(stamp[0], non_blocking=True)
        return self._seen[name]

    def _copy(self, memory: torch.Tensor, begin: int) -> None:
        with self._api.stream(self._copies):
            self._arena.tensor[begin : begin + memory.numel()].copy_(memory, non_blocking=True)
        with self._lock:
            self.moved_bytes += memory.numel()

    def _copied(self, name: str, num_bytes: int, begin_s: float, end_s: float) -> None:
        self._copy_s += end_s - begin_s
        if self._timeline is not None:
            self._timeline.add("fill", name, begin_s, end_s, lane=_LANE, num_bytes=num_bytes)

    def _read(self, name: str, parts: Sequence[Group], begin: int, events: tuple[Any, Any]) -> _Reading:
        """Hand a fill to the readers, who take its groups in order."""
        if self._chunks is None:
            self._chunks = Chunks(self._make_memory, self._num_threads)
        free, ready = events
        reading = _Reading(free, self._last)
        reading.num_left = len(parts) + 1  # this one, too
        self._last = reading.is_over
        reading.work = [self._pool.submit(self._fill, name, group, begin, (reading, ready)) for group in parts]
        self._finish(reading, ready)
        return reading

    def _fill(self, name: str, group: Group, begin: int, ticket: tuple[_Reading, Any]) -> None:
        """Runs on a reader's thread: fill a chunk and send it off, while others fill the next ones.

        The wait for the place to be free is given to the stream here: copies of earlier fills, which may still be
        read, shall not stand behind it.
        """
        assert self._chunks is not None
        reading, ready = ticket
        try:
            with self._chunks.taken() as chunk:
                begun_s = time.perf_counter()
                group.write(chunk.memory.view)
                self._note(name, begun_s, group.num_bytes)
                reading.before.wait()
                with self._lock:
                    is_first, reading.is_begun = not reading.is_begun, True
                    if is_first:
                        self._copies.wait_event(reading.free)
                for piece in group.copies:
                    source = chunk.memory.tensor[piece.offset : piece.offset + piece.num_bytes]
                    self._copy(source, begin + piece.position)
                chunk.copied = self._api.Event()
                chunk.copied.record(self._copies)
        finally:
            self._finish(reading, ready)

    def _finish(self, reading: _Reading, ready: Any) -> None:
        """One less to wait for; the last one records the event behind all copies of the fill."""
        with self._lock:
            reading.num_left -= 1
            is_last = not reading.num_left
        if is_last:
            if not reading.is_begun:
                self._copies.wait_event(reading.free)
            ready.record(self._copies)
            reading.is_over.set()

    def _note(self, name: str, begun_s: float, num_bytes: int) -> None:
        ended_s = time.perf_counter()
        with self._lock:
            self._read_s += ended_s - begun_s
        if self._timeline is not None:
            lane = threading.current_thread().name
            self._timeline.add("fill", name, begun_s, ended_s, lane=lane, num_bytes=num_bytes)

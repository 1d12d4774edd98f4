"""Transfers on CUDA: a copy stream beside the compute stream, ordered by events; the host waits for neither.

Weights in the host store move with one copy per unit. Weights in files go through a ring of pinned chunks, filled by
reader threads and copied chunk by chunk. Of weights that ranks have in parts, each rank copies its own, and all gather
them on the copy stream; the reader's thread asks for all of these, so that every rank does in one order. The arena
lives as long as the transfers, so that no allocator needs to be told which stream uses it.

Source: the CUDA programming guide on streams and events; the ready and free events of Lightricks' block streaming.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from penstock.offload.transfer import Ticket, require_alone
from penstock.timeline import Timeline
from penstock.weights.host import StoredSource
from penstock.weights.memory import Arena, HostMemory
from penstock.weights.shards import ShardSource
from penstock.weights.sources import PART_BYTES, Part, Source

_NUM_CHUNKS = 4
_CHUNK_BYTES = 2 * PART_BYTES
_LANE = "copy stream"


class CudaTransfer:
    """Copies to a CUDA device.

    Args:
        arena: on the device.
        timeline: where fills from files are noted, or None.
        api: `torch.cuda`, or what a test puts in its place.
        make_memory: makes a pinned chunk of so many bytes.
    """

    is_seen_by_torch = True

    def __init__(
        self,
        arena: Arena,
        timeline: Timeline | None = None,
        api: Any = torch.cuda,
        make_memory: Callable[[int], HostMemory] = lambda num_bytes: HostMemory(num_bytes, is_pinned=True),
    ) -> None:
        self._arena = arena
        self._timeline = timeline
        self._api = api
        self._device = arena.tensor.device
        self._copies = api.Stream(device=self._device)
        self._make_memory = make_memory
        self._chunks: queue.SimpleQueue[tuple[HostMemory, Any]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="penstock-reader")
        self._lock = threading.Lock()
        self._timed: list[tuple[Any, Any]] = []
        self._busy_s = 0.0
        self.moved_bytes = 0
        self.num_lanes = 1
        self._num_shared = 0

    @property
    def busy_s(self) -> float:
        """Seconds that copies took, those from files with their reads; synchronises with the copies done so far."""
        with self._lock:
            timed, self._timed = self._timed, []
        for begun, done in timed:
            done.synchronize()
            self._busy_s += begun.elapsed_time(done) / 1000
        return self._busy_s

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Order the copies behind all that the compute stream was given so far."""
        free = self._api.Event()
        free.record(self._api.current_stream(self._device))
        ready = self._api.Event(enable_timing=True)
        if isinstance(source, ShardSource):
            gathering = self._pool.submit(self._gather, name, source, begin, (free, ready))
            return Ticket(name, (gathering, ready), is_shared=True)
        if isinstance(source, StoredSource):
            self._copies.wait_event(free)
            begun = self._api.Event(enable_timing=True)
            begun.record(self._copies)
            self._copy(source.memory, begin)
            ready.record(self._copies)
            with self._lock:
                self._timed.append((begun, ready))
                del self._timed[:-10_000]
            return Ticket(name, (None, ready))
        return Ticket(name, (self._pool.submit(self._read, name, source.parts, begin, (free, ready)), ready))

    def wait(self, ticket: Ticket) -> None:
        """Let the compute stream wait; the host waits only for reads that are late."""
        reading, ready = ticket.work
        if reading is not None:
            reading.result()
        self._api.current_stream(self._device).wait_event(ready)

    def cancel(self, ticket: Ticket) -> None:
        """Let what was begun finish; copies of later fills come behind it on the stream anyway."""
        reading, _ = ticket.work
        if reading is not None and (ticket.is_shared or not reading.cancel()):
            reading.exception()

    def is_done(self, ticket: Ticket) -> bool:
        """Whether no reader is at it; copies that were begun are followed by later ones on their stream."""
        reading, _ = ticket.work
        return reading is None or (not ticket.is_shared and bool(reading.done()))

    def drain(self) -> None:
        """Drop what is queued, and wait for the reader; the stream keeps copies in order.

        Raises:
            GenerationError: where ranks gather, and the others may be elsewhere.
        """
        require_alone(self._num_shared)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="penstock-reader")

    def restart(self) -> None:
        """CUDA does not survive a fork: torch refuses the child's next call with its own advice."""

    def close(self) -> None:
        """End the reader and wait for the copies."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._copies.synchronize()
        while self._chunks is not None and not self._chunks.empty():
            self._chunks.get()[0].close()

    def _copy(self, memory: torch.Tensor, begin: int) -> None:
        with self._api.stream(self._copies):
            self._arena.tensor[begin : begin + memory.numel()].copy_(memory, non_blocking=True)
        with self._lock:
            self.moved_bytes += memory.numel()

    def _read(self, name: str, parts: Sequence[Part], begin: int, events: tuple[Any, Any]) -> None:
        """Runs on the reader's thread: fill chunks and send them off, the next while the last one is copied.

        The wait for the place to be free is given to the stream here: copies of earlier fills, which may still be
        read, shall not stand behind it.
        """
        free, ready = events
        self._copies.wait_event(free)
        self._read_chunks(name, parts, begin)
        ready.record(self._copies)

    def _gather(self, name: str, source: ShardSource, begin: int, events: tuple[Any, Any]) -> None:
        """Runs on the reader's thread: bring this rank's part to its place, then gather all of them."""
        free, ready = events
        self._num_shared += 1
        self._copies.wait_event(free)
        first = begin + source.begin
        own = self._arena.tensor[first : first + source.part_bytes]
        if not isinstance(source.own, StoredSource):
            self._read_chunks(name, source.own.parts, first)
        elif source.own.memory.device == self._device:
            own = source.own.memory
        else:
            self._copy(source.own.memory, first)
        with self._api.stream(self._copies):
            source.sharers.all_gather_into(self._arena.tensor[begin : begin + source.num_bytes], own)
        with self._lock:
            self.moved_bytes += source.num_bytes - source.part_bytes
        ready.record(self._copies)

    def _read_chunks(self, name: str, parts: Sequence[Part], begin: int) -> None:
        if self._chunks is None:
            self._chunks = queue.SimpleQueue()
            for _ in range(_NUM_CHUNKS):
                self._chunks.put((self._make_memory(_CHUNK_BYTES), None))
        for group in _groups(parts):
            begun_s = time.perf_counter()
            first, last = group[0].position, group[-1].position + group[-1].num_bytes
            chunk, copied = self._chunks.get()
            try:
                if copied is not None:
                    copied.synchronize()
                for part in group:
                    at = part.position - first
                    part.write(chunk.view[at : at + part.num_bytes])
                self._copy(chunk.tensor[: last - first], begin + first)
                copied = self._api.Event()
                copied.record(self._copies)
            finally:
                self._chunks.put((chunk, copied))
            self._note(name, begun_s, last - first)

    def _note(self, name: str, begun_s: float, num_bytes: int) -> None:
        ended_s = time.perf_counter()
        with self._lock:
            self._busy_s += ended_s - begun_s
        if self._timeline is not None:
            self._timeline.add("fill", name, begun_s, ended_s, lane=_LANE, num_bytes=num_bytes)


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Neighbouring parts that fit a chunk together."""
    group: list[Part] = []
    for part in parts:
        if group and part.position + part.num_bytes - group[0].position > _CHUNK_BYTES:
            yield group
            group = []
        group.append(part)
    if group:
        yield group

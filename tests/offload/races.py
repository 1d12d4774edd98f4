"""A CUDA that runs at once and keeps vector clocks: what no wait puts in order is a race, however it went this time.

Streams, events and host threads each have a clock. An operation on a stream comes after those before it on the
stream, after the events the stream was told to wait for, and after what the host had seen when it gave it.

Collectives are watched as well: ranks that launch those of two communicators in different orders wait for each other,
and a rank that launches them from several threads has an order that is chance.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Clock = dict[str, int]


def join(clock: Clock, other: Clock) -> None:
    """Let `clock` come after `other`."""
    for name, count in other.items():
        clock[name] = max(clock.get(name, 0), count)


class Memory:
    """Bytes under watch, and the races found on them."""

    def __init__(self) -> None:
        self._accesses: list[tuple[str, str, int, int, Clock]] = []
        self.races: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()

    def access(self, kind: str, what: str, span: tuple[int, int], clock: Clock) -> None:
        """Note a read or a write (`R` or `W`) of the bytes from `span[0]` to `span[1]`."""
        with self._lock:
            for other, other_what, begin, end, seen in self._accesses:
                overlaps = begin < span[1] and span[0] < end
                is_before = all(clock.get(name, 0) >= count for name, count in seen.items())
                if overlaps and not is_before and "W" in (kind, other):
                    self.races.append((f"{kind} after {other}", what, other_what))
            self._accesses.append((kind, what, *span, clock))


class Stream:
    """Runs at once, in order."""

    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.clock: Clock = {}
        self.operations: list[str] = []

    def tick(self, what: str) -> Clock:
        """An operation begins: its clock."""
        join(self.clock, self.cuda.host())
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        self.operations.append(what)
        return dict(self.clock)

    def wait_event(self, event: Event) -> None:
        """What comes next on this stream comes after the event."""
        self.operations.append(f"wait {event.name}")
        if f"{self.name} waits" not in self.cuda.dropped:
            join(self.clock, event.clock)

    def synchronize(self) -> None:
        """The host waits."""
        join(self.cuda.host(), self.clock)


class Event:
    """A point on a stream; it has passed once the test lets it."""

    def __init__(self, cuda: Cuda, enable_timing: bool = False) -> None:
        self.cuda, self.enable_timing = cuda, enable_timing
        self.clock: Clock = {}
        self.name = ""
        self.at_ms = 0.0

    def record(self, stream: Stream) -> None:
        """Here."""
        join(stream.clock, self.cuda.host())
        self.clock = dict(stream.clock)
        self.name = f"{stream.name} {stream.clock.get(stream.name, 0)}"
        self.at_ms = self.cuda.now_ms

    def query(self) -> bool:
        """Whether it has passed; asking waits for nothing."""
        return not self.cuda.is_busy

    def synchronize(self) -> None:
        """The host waits."""
        if "host waits" not in self.cuda.dropped:
            join(self.cuda.host(), self.clock)

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds of the device's own clock."""
        assert self.enable_timing and other.enable_timing
        return other.at_ms - self.at_ms


class Cuda:
    """Stands in for `torch.cuda`.

    Args:
        dropped: waits that are left out: `copies waits`, `exchanges waits`, `compute waits`, `host waits`.

    Attributes:
        now_ms: what the device's clock shows; the test moves it.
        is_busy: whether nothing that was launched has passed yet, as far as `query` tells.
        devices: that threads have made their current one, by thread.
    """

    def __init__(self, *dropped: str) -> None:
        self.dropped = dropped
        self.compute = Stream(self, "compute")
        self.copies = Stream(self, "copies")
        self.exchanges = Stream(self, "exchanges")
        self._made = iter([self.copies, self.exchanges])
        self.now_ms = 0.0
        self.is_busy = False
        self.devices: dict[int, torch.device] = {}
        self._current = threading.local()
        self._hosts: dict[int, Clock] = {}

    def host(self) -> Clock:
        """This thread's clock."""
        return self._hosts.setdefault(threading.get_ident(), {})

    def host_access(self) -> Clock:
        """A clock for what this thread does now."""
        clock = self.host()
        name = f"host {threading.get_ident()}"
        clock[name] = clock.get(name, 0) + 1
        return dict(clock)

    def Stream(self, device: torch.device) -> Stream:
        """The copy stream, then that of exchanges."""
        return next(self._made)

    def set_device(self, device: torch.device) -> None:
        """Note it."""
        self.devices[threading.get_ident()] = device

    def Event(self, enable_timing: bool = False) -> Event:
        """A new event."""
        return Event(self, enable_timing)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Compute, but where `stream` says otherwise."""
        return getattr(self._current, "stream", self.compute)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one of this thread."""
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream


class Collectives:
    """What the ranks of a job launch on their communicators, in the order in which each does."""

    def __init__(self) -> None:
        self._launches: dict[int, list[tuple[str, int]]] = {}

    def launch(self, rank: int, communicator: str) -> None:
        """A rank launches a collective, on this thread."""
        self._launches.setdefault(rank, []).append((communicator, threading.get_ident()))

    def order(self, rank: int) -> list[str]:
        """The communicators that a rank used, in order."""
        return [communicator for communicator, _ in self._launches.get(rank, [])]

    @property
    def failures(self) -> list[str]:
        """Where two ranks differ, and which ranks leave their order to chance."""
        first, *others = sorted(self._launches)
        differing = [f"ranks {first} and {rank}" for rank in others if self.order(rank) != self.order(first)]
        threads = {rank: {thread for _, thread in launches} for rank, launches in self._launches.items()}
        return [*differing, *(f"threads of rank {rank}" for rank, found in threads.items() if len(found) > 1)]


class WatchedArena:
    """What a transfer sees of an arena: a tensor whose slices take copies, each a write of the current stream."""

    def __init__(
        self,
        arena: Any,
        cuda: Cuda,
        memory: Memory,
        chunks: dict[int, Memory] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._real, self._cuda, self._memory, self._chunks = arena.tensor, cuda, memory, chunks or {}
        self.device = device or arena.tensor.device
        self.tensor = self

    def __getitem__(self, span: slice) -> Any:
        return _Slice(self, span)


class _Slice:
    def __init__(self, arena: WatchedArena, span: slice) -> None:
        self._arena, self._span = arena, span

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        arena = self._arena
        clock = arena._cuda.current_stream().tick("copy")
        chunk = arena._chunks.get(source.untyped_storage().data_ptr())
        if chunk is not None:
            chunk.access("R", "copy", (0, source.numel()), clock)
        arena._memory.access("W", "fill", (self._span.start, self._span.stop), clock)
        arena._real[self._span].copy_(source)

    def gathered(self, own: Any) -> None:
        """All ranks' parts come here, on the current stream; where one has all of it, its part is the whole."""
        arena = self._arena
        clock = arena._cuda.current_stream().tick("gather")
        arena._memory.access("W", "gather", (self._span.start, self._span.stop), clock)
        if not isinstance(own, _Slice):
            arena._real[self._span].copy_(own)

    def view(self, dtype: torch.dtype) -> Any:
        """The numbers of a stamp, which only the stream of exchanges touches."""
        return self._arena._real[self._span].view(dtype)

    def numel(self) -> int:
        """Bytes."""
        return self._span.stop - self._span.start

    def __getitem__(self, span: slice) -> _Slice:
        begin = self._span.start
        return _Slice(self._arena, slice(begin + (span.start or 0), begin + span.stop))

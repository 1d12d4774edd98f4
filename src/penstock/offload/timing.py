"""When compute and copies happen: on the host's clock, or on a device's own.

A kernel or a copy on CUDA is launched long before it runs, so the host's clock says nothing about it. There, moments
are events: recorded in the order of a stream, and read once they have passed. Owns how a moment becomes seconds. Does
not know what is measured.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from penstock.timeline import Timeline

Tell = Callable[[float, float], None]
"""Takes begin and end, in seconds of `time.perf_counter()`."""

_REANCHOR_S = 10.0  # CUDA tells milliseconds in float32: a microsecond is exact for so long


class Clock(Protocol):
    """Measures what a device does."""

    def mark(self, stream: Any = None) -> Any:
        """This moment, in the order of a stream; of the current one if left out."""
        ...

    def between(self, begin: Any, end: Any, tell: Tell) -> None:
        """Call `tell` with the seconds of two marks, once both have passed."""
        ...

    def settle(self) -> None:
        """Wait until everything that was measured has been told."""
        ...


class HostClock:
    """A device that is done when the host is."""

    def mark(self, stream: Any = None) -> float:
        """Now."""
        return time.perf_counter()

    def between(self, begin: float, end: float, tell: Tell) -> None:
        """Call `tell` at once."""
        tell(begin, end)

    def settle(self) -> None:
        """Nothing is left to tell."""


class EventClock:
    """Events of CUDA.

    The first mark is set against the host's clock, so that all seconds are those of `time.perf_counter()`.

    Args:
        device: whose streams are measured.
        api: `torch.cuda`, or what a test puts in its place.

    Cost: a mark is one event, some microseconds of the host. What has passed is told by the next `between`, so no
        more events are kept than the device has before it. `settle` waits for the device, nothing else does.
    """

    def __init__(self, device: torch.device, api: Any = torch.cuda) -> None:
        self._device = device
        self._api = api
        self._pending: deque[tuple[Any, Any, Tell]] = deque()
        self._telling = threading.Lock()
        anchor = self.mark()
        anchor.synchronize()
        self._anchor = (anchor, time.perf_counter())

    def mark(self, stream: Any = None) -> Any:
        """An event on the stream."""
        event = self._api.Event(enable_timing=True)
        event.record(self._api.current_stream(self._device) if stream is None else stream)
        return event

    def between(self, begin: Any, end: Any, tell: Tell) -> None:
        """Note it, and tell what has passed meanwhile; the host waits for nothing."""
        self._pending.append((begin, end, tell))
        if self._telling.acquire(blocking=False):
            try:
                self._take(is_waiting=False)
            finally:
                self._telling.release()

    def settle(self) -> None:
        """Wait for the device."""
        with self._telling:
            self._take(is_waiting=True)

    def _take(self, is_waiting: bool) -> None:
        while self._pending:
            begin, end, tell = self._pending[0]
            if is_waiting:
                end.synchronize()
            elif not end.query():
                return
            self._pending.popleft()
            tell(self._seconds(begin), self._seconds(end))

    def _seconds(self, event: Any) -> float:
        anchor, anchor_s = self._anchor
        passed_s = anchor.elapsed_time(event) / 1000
        if passed_s > _REANCHOR_S:
            self._anchor = (event, anchor_s + passed_s)
        return float(anchor_s + passed_s)


class Stays:
    """When units come and go, and how long compute stands still for them.

    Args:
        clock: of the device.
        timeline: where it is noted, or None.
    """

    def __init__(self, clock: Clock, timeline: Timeline | None) -> None:
        self._clock = clock
        self._timeline = timeline
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds that compute stood still; settles the clock."""
        self._clock.settle()
        return self._waited_s

    def mark(self) -> Any:
        """This moment, in the order of compute."""
        return self._clock.mark()

    def waited(self, name: str, begin: Any, end: Any) -> None:
        """Compute stood still for a unit between two moments."""

        def tell(begin_s: float, end_s: float) -> None:
            self._waited_s += end_s - begin_s
            if self._timeline is not None:
                self._timeline.add("wait", name, begin_s, end_s)

        self._clock.between(begin, end, tell)

    def entered(self, name: str, num_bytes: int, at: Any) -> None:
        """A unit's bytes occupy the device since a moment."""
        timeline = self._timeline
        if timeline is not None:
            self._clock.between(at, at, lambda at_s, _: timeline.entered(name, num_bytes, at_s))

    def left(self, name: str) -> None:
        """A unit was given up."""
        timeline = self._timeline
        if timeline is not None:
            now = self._clock.mark()
            self._clock.between(now, now, lambda at_s, _: timeline.left(name, at_s))


def clock_of(device: torch.device) -> Clock:
    """What measures a device."""
    return EventClock(device) if device.type == "cuda" else HostClock()

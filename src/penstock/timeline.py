"""What happened when: units filled, waited for and computed, and the bytes that lay on the device meanwhile.

Owns the record and its export as a Chrome trace. Does not know what a unit is made of, nor devices, nor files.
All times are seconds of `time.perf_counter()`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

SpanKind = Literal["fill", "wait", "compute"]

MAX_EVENTS = 1_000_000
"""How many events a timeline keeps if not told otherwise; about 150 MB of host memory when full."""

_PID = 1
_BYTES_TRACK = "device bytes"

_Track = tuple[list[dict[str, Any]], list[int]]
"""Events of one thread, and the ends of the spans around the last of them, inmost last."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        kind: fill: a unit's bytes were read or copied into their slot; wait: compute stood still because a unit was not
            there yet; compute: a unit's forward.
        unit: name of the unit.
        begin_s: when it began.
        end_s: when it ended.
        lane: where it happened: name of a reader thread or a copy stream; "main" for compute.
        num_bytes: moved; 0 where nothing moves.
    """

    kind: SpanKind
    unit: str
    begin_s: float
    end_s: float
    lane: str = "main"
    num_bytes: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds from begin to end."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class Residence:
    """The time that a unit's bytes occupied the device.

    Attributes:
        unit: name of the unit.
        num_bytes: how many.
        begin_s: from when on.
        end_s: until when; None while they are still there.
    """

    unit: str
    num_bytes: int
    begin_s: float
    end_s: float | None


class Timeline:
    """A record that any thread may write into while others read it.

    Events may arrive in any order. Of more than `max_events` only the first are kept; the others are counted in
    `dropped`, and everything that is derived (seconds, bytes, peak) then covers the kept ones alone.

    Args:
        max_events: how many events to keep, all kinds together; threads that write at the very moment the record fills
            up may each add one more.

    Attributes:
        begin_s: when the timeline was made; exports count from here.

    Cost: one event is a tuple and a list's append, without a lock. Everything that reads walks all events, so read
    when the work is done.
    """

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self.begin_s = time.perf_counter()
        self._max_events = max_events
        self._spans: list[tuple[SpanKind, str, float, float, str, int]] = []
        self._moves: list[tuple[float, str, int | None]] = []  # None: the unit left
        self._dropped = 0
        self._dropping = threading.Lock()
        self._settle: Callable[[], None] | None = None

    def late(self, settle: Callable[[], None]) -> None:
        """Have something called before the record is read: what is still to be told of, as a device's clock does."""
        self._settle = settle

    def add(
        self, kind: SpanKind, unit: str, begin_s: float, end_s: float, lane: str = "main", num_bytes: int = 0
    ) -> None:
        """Record something that took time; the arguments are those of a `Span`."""
        if len(self._spans) + len(self._moves) < self._max_events:
            self._spans.append((kind, unit, begin_s, end_s, lane, num_bytes))
        else:
            self._drop()

    def entered(self, unit: str, num_bytes: int, at_s: float) -> None:
        """Record that a unit's bytes begin to occupy the device."""
        self._move(at_s, unit, num_bytes)

    def left(self, unit: str, at_s: float) -> None:
        """Record that a unit's bytes were given up: those that entered first, if they entered more than once.

        A unit that never entered is ignored.
        """
        self._move(at_s, unit, None)

    @property
    def spans(self) -> list[Span]:
        """All spans, in the order of their report."""
        return [Span(*span) for span in self._told()]

    @property
    def residences(self) -> list[Residence]:
        """All residences, in the order of their begin."""
        return self._replay()[0]

    @property
    def dropped(self) -> int:
        """How many events came after the record was full."""
        return self._dropped

    @property
    def first_s(self) -> float:
        """The earliest time that any event names; `begin_s` where there is none."""
        return min(self._times(), default=self.begin_s)

    @property
    def last_s(self) -> float:
        """The latest time that any event names; `begin_s` where there is none."""
        return max(self._times(), default=self.begin_s)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that lay on the device at once."""
        return max(num_bytes for _, num_bytes in self.device_bytes())

    def seconds(self, kind: SpanKind) -> float:
        """Seconds spent in spans of a kind, all lanes added up: what overlaps counts more than once."""
        return sum(span[3] - span[2] for span in self._told() if span[0] == kind)

    def device_bytes(self) -> list[tuple[float, int]]:
        """Bytes on the device as a step function.

        Returns:
            (time in seconds, bytes from then on), by time, from 0 bytes at the beginning. What happens at the same
            time stands in the order of its report.
        """
        steps = self._replay()[1]
        begin_s = min(self.begin_s, steps[0][0]) if steps else self.begin_s
        return [(begin_s, 0), *steps]

    def to_chrome(self) -> str:
        """The record as Chrome's trace event JSON, for chrome://tracing and https://ui.perfetto.dev.

        Every lane is a thread, in whole microseconds since the timeline was made; a lane whose spans overlap is spread
        over several threads, because a viewer only shows spans of one thread that follow or contain each other.

        Source: "Trace Event Format", Google, 2016: complete (X), metadata (M) and counter (C) events.
        """
        events = [_metadata("process_name", 0, name="penstock")]
        lanes: dict[str, list[Span]] = {"main": []}
        for span in sorted(self.spans, key=lambda span: span.begin_s):
            lanes.setdefault(span.lane, []).append(span)
        tid = 0
        for lane, spans in lanes.items():
            for number, track in enumerate(_tracks(spans, self.begin_s), 1):
                tid += 1
                events.append(_metadata("thread_name", tid, name=lane if number == 1 else f"{lane} ({number})"))
                events.append(_metadata("thread_sort_index", tid, sort_index=tid))
                events.extend({**event, "pid": _PID, "tid": tid} for event in track)
        steps = self.device_bytes()
        for at_s, num_bytes in steps:
            at_us = _microseconds(at_s, self.begin_s)
            counter = {"name": _BYTES_TRACK, "ph": "C", "ts": at_us, "pid": _PID, "args": {"bytes": num_bytes}}
            events.append(counter)
        facts = {"peak_bytes": max(num_bytes for _, num_bytes in steps), "dropped": self._dropped}
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts})

    def _move(self, at_s: float, unit: str, num_bytes: int | None) -> None:
        if len(self._spans) + len(self._moves) < self._max_events:
            self._moves.append((at_s, unit, num_bytes))
        else:
            self._drop()

    def _drop(self) -> None:
        with self._dropping:
            self._dropped += 1

    def _told(self) -> list[tuple[SpanKind, str, float, float, str, int]]:
        """All spans, those included that were still to be told of."""
        if self._settle is not None:
            self._settle()
        return list(self._spans)

    def _times(self) -> Iterator[float]:
        for span in self._told():
            yield from span[2:4]
        for move in list(self._moves):
            yield move[0]

    def _replay(self) -> tuple[list[Residence], list[tuple[float, int]]]:
        """Residences, and (time, bytes) after each move, by time."""
        if self._settle is not None:
            self._settle()
        residences: list[Residence] = []
        inside: dict[str, deque[int]] = {}  # per unit, which of the residences have not ended
        steps: list[tuple[float, int]] = []
        total = 0
        for at_s, unit, num_bytes in sorted(self._moves.copy(), key=lambda move: move[0]):
            if num_bytes is not None:
                inside.setdefault(unit, deque()).append(len(residences))
                residences.append(Residence(unit, num_bytes, at_s, None))
                total += num_bytes
            elif inside.get(unit):
                index = inside[unit].popleft()
                begun = residences[index]
                residences[index] = Residence(unit, begun.num_bytes, begun.begin_s, at_s)
                total -= begun.num_bytes
            else:
                continue
            steps.append((at_s, total))
        return residences, steps


def _metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PID, "tid": tid, "args": args}


def _microseconds(at_s: float, origin_s: float) -> int:
    """Whole microseconds: fractions would make neighbours overlap by a rounding error."""
    return round((at_s - origin_s) * 1e6)


def _tracks(spans: Iterable[Span], origin_s: float) -> list[list[dict[str, Any]]]:
    """Complete events without pid and tid, on as few tracks as give each one whose spans nest."""
    timed = [(_microseconds(span.begin_s, origin_s), _microseconds(span.end_s, origin_s), span) for span in spans]
    tracks: list[_Track] = []
    for begin_us, late_us, span in sorted(timed, key=lambda item: (item[0], -item[1])):
        end_us = max(begin_us, late_us)
        events, ends = _fitting(tracks, begin_us, end_us)
        event = {"name": f"{span.kind} {span.unit}", "cat": span.kind, "ph": "X", "ts": begin_us}
        events.append({**event, "dur": end_us - begin_us, "args": {"unit": span.unit, "bytes": span.num_bytes}})
        ends.append(end_us)
    return [events for events, _ in tracks]


def _fitting(tracks: list[_Track], begin_us: int, end_us: int) -> _Track:
    """The first track on which a span follows or lies within what is there; a new one if there is none."""
    for events, ends in tracks:
        while ends and ends[-1] <= begin_us:
            ends.pop()
        if not ends or end_us <= ends[-1]:
            return events, ends
    tracks.append(([], []))
    return tracks[-1]

"""A timeline keeps what it is told, adds up bytes by time, and exports a trace that viewers accept."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from penstock.timeline import Residence, Span, Timeline
from tests import processes
from tests.media.timelines import MIB, streamed


def complete_events(timeline: Timeline) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(timeline.to_chrome())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


def test_spans_come_back_as_they_were_told() -> None:
    timeline = Timeline()
    timeline.add("fill", "a", 1.0, 3.0, "reader-0", 10)
    timeline.add("wait", "a", 2.0, 3.0)
    timeline.add("compute", "a", 3.0, 3.5)
    assert timeline.spans == [
        Span("fill", "a", 1.0, 3.0, "reader-0", 10),
        Span("wait", "a", 2.0, 3.0, "main", 0),
        Span("compute", "a", 3.0, 3.5, "main", 0),
    ]
    assert timeline.spans[0].duration_s == 2.0
    with pytest.raises(FrozenInstanceError):
        timeline.spans[0].unit = "b"  # type: ignore[misc]


def test_seconds_add_up_over_all_lanes() -> None:
    timeline = Timeline()
    timeline.add("fill", "a", 1.0, 3.0, "reader-0")
    timeline.add("fill", "b", 2.0, 2.5, "reader-1")
    assert timeline.seconds("fill") == 2.5
    assert timeline.seconds("wait") == 0


def test_empty_timeline() -> None:
    timeline = Timeline()
    assert timeline.spans == timeline.residences == []
    assert timeline.device_bytes() == [(timeline.begin_s, 0)]
    assert (timeline.peak_bytes, timeline.dropped) == (0, 0)
    assert timeline.first_s == timeline.last_s == timeline.begin_s
    assert complete_events(timeline) == []


def test_bytes_on_the_device_by_time_not_by_report() -> None:
    timeline = Timeline()
    begin_s = timeline.begin_s
    timeline.entered("a", 10, begin_s + 1)
    timeline.entered("b", 20, begin_s + 3)  # reported before what happened earlier
    timeline.left("a", begin_s + 2)
    steps = [(at_s - begin_s, num_bytes) for at_s, num_bytes in timeline.device_bytes()]
    assert steps == [(0, 0), (pytest.approx(1), 10), (pytest.approx(2), 0), (pytest.approx(3), 20)]
    assert timeline.peak_bytes == 20
    assert timeline.residences == [
        Residence("a", 10, begin_s + 1, begin_s + 2),
        Residence("b", 20, begin_s + 3, None),
    ]


def test_what_happens_at_the_same_time_counts_in_the_order_of_its_report() -> None:
    hands_over, overlaps = Timeline(), Timeline()
    for timeline in (hands_over, overlaps):
        timeline.entered("a", 10, timeline.begin_s)
    hands_over.left("a", hands_over.begin_s + 1)
    hands_over.entered("b", 10, hands_over.begin_s + 1)
    overlaps.entered("b", 10, overlaps.begin_s + 1)
    overlaps.left("a", overlaps.begin_s + 1)
    assert (hands_over.peak_bytes, overlaps.peak_bytes) == (10, 20)


def test_unit_that_enters_again_before_it_left() -> None:
    timeline = Timeline()
    begin_s = timeline.begin_s
    timeline.entered("a", 10, begin_s + 1)
    timeline.entered("a", 30, begin_s + 2)
    timeline.left("a", begin_s + 3)
    timeline.left("stranger", begin_s + 4)
    assert [num_bytes for _, num_bytes in timeline.device_bytes()] == [0, 10, 40, 30]
    assert timeline.residences == [Residence("a", 10, begin_s + 1, begin_s + 3), Residence("a", 30, begin_s + 2, None)]


def test_events_before_the_timeline_was_made() -> None:
    timeline = Timeline()
    timeline.entered("a", 10, timeline.begin_s - 2)
    timeline.add("fill", "a", timeline.begin_s - 2, timeline.begin_s - 1)
    assert timeline.device_bytes() == [(timeline.begin_s - 2, 0), (timeline.begin_s - 2, 10)]
    assert timeline.first_s == timeline.begin_s - 2
    assert timeline.last_s == timeline.begin_s - 1


def test_streamed_stack_keeps_its_slots_and_residents() -> None:
    timeline = streamed(num_blocks=12, num_slots=2, num_residents=3)
    assert timeline.peak_bytes == (3 + 1) * 64 * MIB + 90 * MIB  # residents, a slot, and the VAE in the other
    assert timeline.device_bytes()[-1] == (timeline.last_s, 0)
    assert all(residence.end_s is not None for residence in timeline.residences)


def test_length_is_bounded() -> None:
    timeline = Timeline(max_events=4)
    for index in range(3):
        timeline.add("compute", f"block.{index}", index, index + 1)
    timeline.entered("a", 10, 1.0)
    timeline.add("compute", "late", 5, 6)
    timeline.left("a", 2.0)
    assert len(timeline.spans) == 3
    assert timeline.dropped == 2
    assert timeline.residences[0].end_s is None
    assert json.loads(timeline.to_chrome())["otherData"] == {"peak_bytes": 10, "dropped": 2}


def test_threads_lose_nothing() -> None:
    timeline, num_threads, num_events = Timeline(max_events=10_000), 8, 2_000
    start = threading.Barrier(num_threads)

    def write(lane: str) -> None:
        start.wait()
        for index in range(num_events // 2):
            timeline.add("fill", "a", index, index + 1, lane, 1)
            timeline.entered("a", 1, index)

    threads = [threading.Thread(target=write, args=(f"reader-{index}",)) for index in range(num_threads)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert timeline.peak_bytes >= 0  # reading meanwhile does no harm
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    kept = len(timeline.spans) + len(timeline.residences)
    assert 10_000 <= kept < 10_000 + num_threads
    assert kept + timeline.dropped == num_threads * num_events


def test_trace_names_lanes_and_counts_bytes() -> None:
    timeline = Timeline()
    begin_s = timeline.begin_s
    timeline.entered("block.0", 10, begin_s + 0.25)
    timeline.add("fill", "block.0", begin_s + 0.25, begin_s + 0.5, "reader-0", 10)
    timeline.add("compute", "block.0", begin_s + 0.5, begin_s + 0.75)
    trace = json.loads(timeline.to_chrome())
    by_phase: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        by_phase[event["ph"]].append(event)
    assert set(by_phase) == {"M", "X", "C"}
    names = {event["tid"]: event["args"]["name"] for event in by_phase["M"] if event["name"] == "thread_name"}
    assert names == {1: "main", 2: "reader-0"}
    assert by_phase["X"] == [
        {
            "name": "compute block.0",
            "cat": "compute",
            "ph": "X",
            "ts": 500_000,
            "dur": 250_000,
            "args": {"unit": "block.0", "bytes": 0},
            "pid": 1,
            "tid": 1,
        },
        {
            "name": "fill block.0",
            "cat": "fill",
            "ph": "X",
            "ts": 250_000,
            "dur": 250_000,
            "args": {"unit": "block.0", "bytes": 10},
            "pid": 1,
            "tid": 2,
        },
    ]
    assert [(event["ts"], event["args"]) for event in by_phase["C"]] == [(0, {"bytes": 0}), (250_000, {"bytes": 10})]


def test_spans_of_one_thread_follow_or_contain_each_other() -> None:
    timeline = streamed()
    begin_s = timeline.last_s
    for unit, start, end in [("a", 0, 5), ("b", 3, 8), ("c", 4, 6), ("d", 5, 5), ("e", 5, 9), ("f", 8, 9)]:
        timeline.add("fill", unit, begin_s + start, begin_s + end, "copy")
    tracks: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in complete_events(timeline):
        assert isinstance(event["ts"], int) and isinstance(event["dur"], int) and event["dur"] >= 0
        tracks[event["tid"]].append(event)
    assert sum(map(len, tracks.values())) == len(timeline.spans)
    for events in tracks.values():
        assert events == sorted(events, key=lambda event: event["ts"])
        for index, one in enumerate(events):
            for other in events[index + 1 :]:
                end, other_end = one["ts"] + one["dur"], other["ts"] + other["dur"]
                assert other["ts"] >= end or other_end <= end
    assert {event["tid"] for event in complete_events(timeline) if event["args"]["unit"] in "abcdef"} == {4, 5}


def test_span_that_ends_before_it_begins_has_no_length_in_a_trace() -> None:
    timeline = Timeline()
    timeline.add("compute", "a", timeline.begin_s + 1, timeline.begin_s + 0.5)  # two clocks, badly aligned
    assert complete_events(timeline)[0]["dur"] == 0


def test_names_in_any_script_survive() -> None:
    timeline = Timeline()
    timeline.add("compute", '\u7ea2"\n', 0.0, 1.0, "\u00fc")
    assert complete_events(timeline)[0]["args"]["unit"] == '\u7ea2"\n'


def test_needs_the_standard_library_alone() -> None:
    code = "import sys, penstock.timeline; print(sorted({'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)))"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

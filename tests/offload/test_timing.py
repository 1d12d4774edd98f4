"""Clocks: seconds of the host, and of a device that is behind it."""

from __future__ import annotations

import time

import pytest
import torch

from penstock.offload import timing
from penstock.offload.timing import EventClock, HostClock, Stays, clock_of
from penstock.timeline import Timeline
from tests.offload.races import Cuda

GPU = torch.device("cuda", 1)


def test_the_host_tells_at_once() -> None:
    told: list[tuple[float, float]] = []
    clock, before = HostClock(), time.perf_counter()
    begin = clock.mark()
    clock.between(begin, clock.mark(), lambda *span: told.append(span))
    clock.settle()
    assert before <= told[0][0] <= told[0][1] <= time.perf_counter()


def test_a_device_tells_when_it_has_passed_and_nobody_waits() -> None:
    api, told = Cuda(), []
    clock, now_s = EventClock(GPU, api), time.perf_counter()
    api.is_busy = True
    begin = clock.mark()
    api.now_ms = 40.0
    clock.between(begin, clock.mark(), lambda *span: told.append(span))
    clock.between(begin, begin, lambda *span: told.append(span))
    assert not told
    api.is_busy = False
    clock.between(begin, begin, lambda *span: told.append(span))  # whatever comes next looks
    assert [round(end_s - begin_s, 6) for begin_s, end_s in told] == [0.04, 0, 0]
    assert told[0][0] == pytest.approx(now_s, abs=1)  # seconds of time.perf_counter()


def test_settling_waits_for_the_device() -> None:
    api, told = Cuda(), []
    clock = EventClock(GPU, api)
    api.is_busy = True
    api.compute.tick("a block")
    mark = clock.mark(api.copies)
    clock.between(mark, clock.mark(), lambda *span: told.append(span))
    assert "compute" not in api.host()
    clock.settle()
    assert len(told) == 1 and "compute" in api.host()


def test_no_more_is_kept_than_the_device_has_before_it() -> None:
    clock = EventClock(GPU, Cuda())
    for _ in range(1000):
        clock.between(clock.mark(), clock.mark(), lambda *_: None)
    assert len(clock._pending) <= 1


def test_hours_are_counted_from_near_moments() -> None:
    """CUDA tells milliseconds in float32."""
    api, told = Cuda(), []
    clock = EventClock(GPU, api)
    for second in range(0, 10_000, 7):
        api.now_ms = 1000.0 * second
        mark = clock.mark()
        clock.between(mark, mark, lambda begin_s, _: told.append(begin_s))
    assert told[-1] - told[0] == pytest.approx(9996)
    assert api.now_ms - clock._anchor[0].at_ms < 1000 * (timing._REANCHOR_S + 7)


def test_stays_are_noted_as_the_device_sees_them() -> None:
    api, timeline = Cuda(), Timeline()
    clock = EventClock(GPU, api)
    timeline.late(clock.settle)
    stays = Stays(clock, timeline)
    api.is_busy = True
    stays.entered("unit", 10, stays.mark())
    api.now_ms = 20.0
    begin = stays.mark()
    api.now_ms = 50.0
    stays.waited("unit", begin, stays.mark())
    api.now_ms = 90.0
    stays.left("unit")
    (stay,) = timeline.residences
    assert stay.end_s is not None and stay.end_s - stay.begin_s == pytest.approx(0.09)
    assert timeline.seconds("wait") == pytest.approx(0.03) and stays.waited_s == pytest.approx(0.03)


def test_the_device_decides_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.EventClock, "__init__", lambda self, device: None)
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(GPU), EventClock)

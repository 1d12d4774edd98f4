"""A process that says nothing: what it does meanwhile, and whether that is a sign of life."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from penstock.engine.liveness import Activity, SignsOfLife, read_activity
from tests.processes import Process, await_that, run


def test_what_a_process_does() -> None:
    """It waits, is stopped, and has ended."""
    with Process[bytes](["sleep", "100"]) as process:
        await_that(lambda: not (activity := read_activity(process.pid)) or not activity.is_held)
        waiting = read_activity(process.pid)
        assert waiting is not None and not waiting.is_stopped and waiting.cpu_s < 1
        process.send_signal(signal.SIGSTOP)
        await_that(lambda: (activity := read_activity(process.pid)) and activity.is_stopped)
        stopped = read_activity(process.pid)
        assert stopped is not None and not stopped.is_held
    assert read_activity(process.pid) is None


def test_a_process_that_computes_is_seen_to() -> None:
    with Process[bytes]([sys.executable, "-c", "while True: pass"]) as process:
        before = read_activity(process.pid)
        await_that(lambda: (now := read_activity(process.pid)) and before and now.cpu_s > before.cpu_s + 0.1)
        busy = read_activity(process.pid)
        assert busy is not None and busy.is_held  # it has a processor, or waits for one


@pytest.mark.parametrize(
    ("cpu", "is_held", "is_alive"),
    [
        (1.0, False, True),  # computes, with Python's lock
        (0.3, False, True),  # gets little of a busy machine
        (0.04, False, False),  # its threads poll: the others of a rank do, which is hung
        (0.0, True, True),  # has no processor, or waits for the disk
        (0.0, False, False),  # waits for what never comes
    ],
)
def test_signs_of_life(cpu: float, is_held: bool, is_alive: bool) -> None:
    signs = SignsOfLife()
    for tick in range(100):
        signs.look(100 + tick / 10, Activity(cpu_s=5 + cpu * tick / 10, is_held=is_held, is_stopped=False))
    assert (signs.seen_s > 108) == is_alive and (signs.seen_s > 0) == is_alive


def test_a_look_that_finds_it_running_now_and_then_is_none() -> None:
    signs = SignsOfLife()
    for tick in range(100):
        signs.look(tick / 10, Activity(cpu_s=0, is_held=tick % 5 == 0, is_stopped=False))
    assert signs.seen_s < 0


def test_windows_do_not_reach_over_its_words() -> None:
    """What it used before it last spoke is none of its silence."""
    signs = SignsOfLife()
    signs.look(0.0, Activity(0, False, True))
    assert signs.is_stopped
    signs.forget()
    signs.look(10.0, Activity(9, False, False))
    signs.look(11.5, Activity(9, False, False))
    assert signs.seen_s < 0 and not signs.is_stopped
    signs.look(12.5, None)  # the system does not tell
    signs.look(13.0, Activity(10, False, False))
    assert signs.seen_s < 0


def test_this_process() -> None:
    own = read_activity(os.getpid())
    assert own is not None and own.is_held and 0 < own.cpu_s <= sum(os.times()[:2]) + 0.1
    assert run(["true"]).returncode == 0 and read_activity(2**31 - 1) is None

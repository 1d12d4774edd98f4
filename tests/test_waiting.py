"""Waiting ends with the event, and fails where the event never comes."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import has_ended, threads_of, wait_until


def test_it_returns_when_the_condition_holds_and_fails_when_it_never_does() -> None:
    asked: list[int] = []
    wait_until(lambda: asked.append(1) or len(asked) == 3)  # type: ignore[func-returns-value]
    assert len(asked) == 3
    with pytest.raises(AssertionError, match="still not so after 0.05 s"):
        wait_until(lambda: False, limit_s=0.05)


def test_threads_that_are_still_ending_are_waited_for_and_others_are_told() -> None:
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="penstock-of-a-test")
    thread.start()
    assert threads_of("penstock-of-a-test") == {"penstock-of-a-test"}
    with pytest.raises(AssertionError):
        has_ended("penstock-of-a-test", limit_s=0.05)
    threading.Timer(0.05, gate.set).start()
    assert has_ended("penstock-of-a-test")

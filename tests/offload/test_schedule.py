"""The order of blocks: supposed, then learnt from the first forward, kept while blocks are only left out."""

from __future__ import annotations

import pytest

from penstock.offload.schedule import Schedule


def run(schedule: Schedule[str], blocks: str) -> None:
    schedule.begin()
    for block in blocks:
        schedule.advance(block)
    schedule.end()


@pytest.mark.parametrize(
    ("ran", "count", "wraps", "expected"),
    [
        ("", 2, False, "ab"),
        ("a", 2, False, "bc"),
        ("abc", 2, False, "d"),
        ("abc", 2, True, "da"),
        ("abcd", 2, True, "ab"),
        ("abcd", 2, False, ""),
        ("ac", 1, False, "d"),  # b was left out
        ("ca", 1, False, "b"),  # back to the begin
        ("ax", 1, False, "b"),  # x is not known
        ("a", 9, True, "bcda"),  # each once
        ("a", 0, True, ""),
    ],
)
def test_what_comes_next(ran: str, count: int, wraps: bool, expected: str) -> None:
    schedule = Schedule("abcd")
    schedule.begin()
    for block in ran:
        schedule.advance(block)
    assert "".join(schedule.upcoming(count, wraps)) == expected


@pytest.mark.parametrize(
    ("forwards", "expected"),
    [
        (["abcd"], "abcd"),
        (["dcba"], "dcba"),  # the first one is how it is
        (["acd"], "acd"),
        (["abcd", "acd"], "abcd"),  # a cache left one out
        (["abcd", "ad", "abcd"], "abcd"),
        (["abcd", "adcb"], "adcb"),  # contradicts
        (["abcd", ""], "abcd"),
        (["", "abcd"], "abcd"),  # a call that failed before its first block
        (["ab", "abcd"], "abcd"),  # a first call that failed half way
        (["abab"], "abab"),  # called twice
        (["abxcd"], "abxcd"),
    ],
)
def test_the_order_is_learnt(forwards: list[str], expected: str) -> None:
    schedule = Schedule("abcd")
    for blocks in forwards:
        run(schedule, blocks)
    assert "".join(schedule.order) == expected


def test_a_block_that_runs_twice_is_found_at_both_places() -> None:
    schedule = Schedule("abc")
    run(schedule, "abac")
    schedule.begin()
    found = []
    for block in "abac":
        schedule.advance(block)
        found.append("".join(schedule.upcoming(1, wraps=True)))
    assert found == ["b", "a", "c", "a"]


def test_nothing_streams_where_there_are_no_blocks() -> None:
    schedule: Schedule[str] = Schedule("")
    run(schedule, "")
    assert schedule.upcoming(3, wraps=False) == []


def test_places_are_those_of_the_order_as_it_ran() -> None:
    schedule = Schedule("abcd")
    assert [schedule.place_of(block) for block in "adx"] == [0, 3, 4]
    run(schedule, "dcd")
    assert [schedule.place_of(block) for block in "dca"] == [0, 1, 3]

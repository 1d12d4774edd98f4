"""One process that writes and reads for several ranks."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from penstock.distributed.board import Board, Call, Failure, Place
from tests import processes


@pytest.fixture
def boards() -> Iterator[tuple[Board, Board]]:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    yield Board(store), Board(store)


def settle(writer: Board) -> None:
    """Wait for an answer: until then the store may not have read what was written before."""
    writer.failures()


def test_places() -> None:
    pair, triple = (0, 1), (0, 1, 2)
    place = Place(Counter({pair: 2, triple: 5}), inside=pair)
    assert not place.is_past(Call(pair, 2)) and place.is_past(Call(pair, 1)) and place.is_past(Call(triple, 5))
    assert place.is_before(Call(pair, 3)) and not place.is_before(Call(pair, 2))
    assert Place(place.numbers).is_past(Call(pair, 2)) and not Place().is_past(Call(pair, 1))
    assert place.is_lost(7, before=Call(pair, 3)) and not place.is_lost(6, before=Call(pair, 3))
    assert not place.is_lost(7, before=Call(pair, 2))


def test_what_one_writes_another_reads(boards: tuple[Board, Board]) -> None:
    writer, reader = boards
    call = Call((0, 1), 3)
    assert reader.place_of(1) == Place()
    writer.place(1, Place(Counter({(0, 1): 3}), (0, 1)))
    settle(writer)
    assert reader.place_of(1) == Place(Counter({(0, 1): 3}), (0, 1))
    assert not reader.is_stuck(1, call)
    writer.stick(1, call)
    settle(writer)
    assert reader.is_stuck(1, call) and not reader.is_stuck(1, Call((0, 1), 4)) and not reader.is_stuck(0, call)
    writer.stick(1, None)
    settle(writer)
    assert not reader.is_stuck(1, call)


def test_values_are_there_once_all_have_brought_theirs(boards: tuple[Board, Board]) -> None:
    writer, reader = boards
    call = Call((0, 2), 1)
    writer.bring(2, call, 0, {2: "b"})
    assert reader.brought(call, 0, Any) is None
    writer.bring(0, call, 0, None)
    settle(writer)
    assert reader.brought(call, 0, dict[int, str] | None) == [None, {2: "b"}]
    assert reader.brought(call, 1, Any) is None and reader.brought(Call((0, 2), 2), 0, Any) is None
    assert reader.brought(Call((0, 2, 3), 1), 0, Any) is None


def test_failures_come_in_their_order(boards: tuple[Board, Board]) -> None:
    writer, reader = boards
    failures = [Failure(rank, Call((0, 1), 2), 5, f"Traceback\nValueError: {rank}\n") for rank in (1, 0)]
    assert [writer.publish(failure) for failure in failures] == [0, 1]
    settle(writer)
    assert reader.failures() == failures == reader.failures()
    assert failures[0].line == "ValueError: 1"


def test_processes_that_have_gone_are_seen(boards: tuple[Board, Board], monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = boards
    assert not reader.is_gone(1) and reader.has_ended(1)  # it never moved in
    writer.move_in(1)
    settle(writer)
    assert not reader.is_gone(1) and not reader.has_ended(1)
    writer.end(1)
    settle(writer)
    assert not reader.is_gone(1) and reader.has_ended(1)
    with processes.Process[bytes]([sys.executable, "-c", ""]) as process:
        process.wait()
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    writer.move_in(0)
    settle(writer)
    assert reader.is_gone(0) and reader.has_ended(0)

"""Convoys: who goes on when, that nobody is left behind, and how they end."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import pytest
import torch

from penstock.offload.convoy import Convoy, EndedError

NAME: ContextVar[str] = ContextVar("name", default="nobody")


class Road:
    """Blocks that calls walk through; notes who was where, whether first, and whether the last."""

    def __init__(self) -> None:
        self.convoy = Convoy()
        self.log: list[tuple[str, int, bool, bool]] = []
        self.ended: list[str] = []

    def walk(
        self, name: str, blocks: Sequence[int], at: Callable[[int], None] = lambda block: None
    ) -> Callable[[], str]:
        def call() -> str:
            try:
                for block in blocks:
                    is_first = self.convoy.arrive(block, block)
                    at(block)
                    self.log.append((name, block, is_first, self.convoy.leave(block)))
            except EndedError:
                self.ended.append(name)
                raise
            return name

        return call

    @property
    def steps(self) -> list[str]:
        return [f"{name}{block}" for name, block, _, _ in self.log]


def test_calls_pass_each_block_together_the_first_and_the_last_told() -> None:
    road = Road()
    assert road.convoy.run([road.walk("a", range(3)), road.walk("b", range(3))]) == ["a", "b"]
    assert road.log == [
        entry for n in range(3) for entry in (("a", n, True, False), ("b", n, False, True))
    ]  # each block is fetched by a, and given up after b
    assert road.convoy.num_together == 2 and not road.convoy.is_going


def test_three_calls() -> None:
    road = Road()
    assert road.convoy.run([road.walk(name, range(2)) for name in "abc"]) == ["a", "b", "c"]
    assert road.steps == ["a0", "b0", "c0", "a1", "b1", "c1"]
    assert [last for *_, last in road.log] == [False, False, True] * 2


def test_who_leaves_blocks_out_waits_for_the_others_and_goes_on_with_them() -> None:
    road = Road()
    road.convoy.run([road.walk("a", [0, 1, 2, 3]), road.walk("b", [0, 3]), road.walk("c", []), road.walk("d", [2])])
    assert road.steps == ["a0", "b0", "a1", "a2", "d2", "a3", "b3"]
    assert [entry[1] for entry in road.log if entry[2]] == [0, 1, 2, 3]  # each fetched once


@pytest.mark.parametrize("seed", range(20))
def test_no_walk_waits_for_ever_and_each_stay_has_one_first_and_one_last(seed: int) -> None:
    chance = random.Random(seed)
    walks = [[chance.randrange(5) for _ in range(chance.randrange(8))] for _ in range(chance.randrange(1, 5))]
    road = Road()
    assert road.convoy.run([road.walk(str(n), walk) for n, walk in enumerate(walks)]) == [
        str(n) for n in range(len(walks))
    ]
    for n, walk in enumerate(walks):
        assert [block for name, block, _, _ in road.log if name == str(n)] == walk
    assert sum(first for _, _, first, _ in road.log) == sum(last for *_, last in road.log)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_call_that_raises_ends_the_others_and_the_next_convoy_works(error: type[BaseException], failing: int) -> None:
    road = Road()

    def fail(block: int) -> None:
        if block == 1:
            raise error("here")

    calls = [road.walk(name, range(3), fail if n == failing else lambda block: None) for n, name in enumerate("abc")]
    with pytest.raises(error, match="here"):
        road.convoy.run(calls)
    assert sorted(road.ended) == sorted(set("abc") - {"abc"[failing]})
    assert not road.convoy.is_going and road.convoy.num_together == 0
    again = Road()
    again.convoy = road.convoy
    again.convoy.run([again.walk(name, range(2)) for name in "ab"])
    assert again.log == [("a", 0, True, False), ("b", 0, False, True), ("a", 1, True, False), ("b", 1, False, True)]


def test_a_call_that_does_not_want_to_end_is_not_waited_for() -> None:
    road = Road()

    def stubborn() -> None:
        for _ in range(3):
            try:
                road.convoy.arrive(2, 2)
            except EndedError:
                road.ended.append("stubborn")

    def fail() -> None:
        road.convoy.arrive(1, 1)
        raise ValueError

    with pytest.raises(ValueError):
        road.convoy.run([fail, road.walk("a", [2]), stubborn])
    assert road.ended == ["stubborn"] * 3 + ["a"] and not road.convoy.is_going


def test_a_call_that_has_not_begun_never_does_once_another_has_failed() -> None:
    road = Road()

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        road.convoy.run([fail, road.walk("a", [0])])
    assert road.log == [] and road.ended == []


def test_who_changed_the_state_of_torch_goes_on_alone_and_the_state_reaches_nobody_else() -> None:
    road = Road()
    seen: list[bool] = []

    def apart() -> str:
        with torch.no_grad():
            return road.walk("a", range(2))()

    def plain() -> str:
        return road.walk("b", range(2), lambda block: seen.append(torch.is_grad_enabled()))()

    with torch.enable_grad():
        assert road.convoy.run([apart, plain]) == ["a", "b"]
    assert road.steps == ["a0", "a1", "b0", "b1"] and seen == [True, True]
    assert all(first and last for _, _, first, last in road.log)


def test_within_a_block_nobody_is_put_aside() -> None:
    road = Road()

    def nested(name: str) -> Callable[[], str]:
        return road.walk(name, [0], lambda block: road.walk(name, [7])() and None)

    road.convoy.run([nested("a"), nested("b")])
    assert road.steps == ["a7", "a0", "b7", "b0"]
    assert road.log == [("a", 7, True, True), ("a", 0, True, False), ("b", 7, True, True), ("b", 0, False, True)]


def test_each_call_has_a_context_of_its_own() -> None:
    road = Road()
    seen: list[str] = []

    def call(name: str) -> Callable[[], str]:
        def make() -> str:
            NAME.set(name)
            return road.walk(name, range(2), lambda block: seen.append(NAME.get()))()

        return make

    road.convoy.run([call("a"), call("b")])
    assert seen == ["a", "b"] * 2 and NAME.get() == "nobody"


def test_a_component_is_begun_by_the_first_call_and_ended_by_the_last() -> None:
    road, told = Road(), []

    def call(blocks: list[int]) -> Callable[[], None]:
        def make() -> None:
            told.append(("begin", road.convoy.begin("transformer")))
            road.walk("a", blocks)()
            told.append(("end", road.convoy.end("transformer")))

        return make

    road.convoy.run([call([0]), call([0, 1])])
    assert told == [("begin", True), ("begin", False), ("end", False), ("end", True)]


def test_outside_of_a_convoy_everybody_passes() -> None:
    road = Road()
    assert road.walk("a", range(2))() == "a"
    assert road.log == [("a", 0, True, True), ("a", 1, True, True)]
    assert road.convoy.begin("x") and road.convoy.end("x") and not road.convoy.is_going
    assert road.convoy.run([]) == [] and road.convoy.run([road.walk("b", [0])]) == ["b"]
    assert road.convoy.num_together == 0


def test_a_convoy_within_a_convoy_goes_one_after_the_other() -> None:
    road = Road()

    def inner() -> Any:
        return road.convoy.run([road.walk("a", [0]), road.walk("b", [0])])

    assert road.convoy.run([inner, road.walk("c", [0])]) == [["a", "b"], "c"]
    assert road.steps == ["a0", "c0", "b0"]


def test_another_thread_is_not_kept_waiting() -> None:
    road = Road()

    def from_a_thread(block: int) -> None:
        thread = threading.Thread(target=road.walk(f"t{block}", [block]))
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()

    road.convoy.run([road.walk("a", [0], from_a_thread), road.walk("b", [0])])
    assert road.log[0] == ("t0", 0, True, True) and road.steps == ["t00", "a0", "b0"]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_call_on_another_stream_of_cuda_goes_on_alone(has_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put aside there, it would leave its stream to the others: torch keeps one per thread."""
    stream = ["first"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream[0])
    road = Road()

    def own_stream() -> str:
        stream[0] = "second"
        try:
            return road.walk("a", [0, 1])()
        finally:
            stream[0] = "first"

    road.convoy.run([own_stream, road.walk("b", [0, 1])])
    assert road.steps == (["a0", "a1", "b0", "b1"] if has_cuda else ["a0", "b0", "a1", "b1"])

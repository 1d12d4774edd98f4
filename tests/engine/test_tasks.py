"""Each order ends exactly once, whatever its ranks say."""

from __future__ import annotations

import pytest

from penstock.engine.tasks import Tasks
from penstock.request import GenerationRequest, StepEvent
from penstock.wire import Began, Ended, Failure, Order, OrderEvent, Step, Timings

DIED = Failure(code="rank_died", message="gone")
FULL = Failure(code="out_of_memory", message="full")


class Heard(list[OrderEvent]):
    """What listeners heard."""

    def ends(self) -> list[str | None]:
        return [event.failure.code if event.failure else None for event in self if isinstance(event, Ended)]


def tasks_of(heard: Heard, *ids: str) -> Tasks:
    tasks = Tasks(max_queue=10, num_groups=1)
    for order_id in ids:
        tasks.put(Order(id=order_id, request=GenerationRequest(), folder=""), heard.append)
    return tasks


def step(order_id: str, number: int = 1) -> Step:
    return Step(id=order_id, event=StepEvent(item=0, stage=0, step=number, total=5, elapsed_s=0.0))


def test_an_order_begins_goes_on_and_ends() -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a", "b")
    assert [order.id for order in tasks.take(0, 1)] == ["a"] and tasks.of_group(0) == ["a"] and tasks.num_waiting == 1
    tasks.tell(step("a"))
    tasks.tell(Ended(id="a", timings=Timings(denoise_s=2.0)))
    assert heard.ends() == []  # its other ranks still work
    tasks.finish(0)
    assert [type(event) for event in heard] == [Began, Step, Ended]
    assert isinstance(heard[-1], Ended) and heard[-1].timings.denoise_s == 2.0 and heard[-1].timings.total_s > 0
    tasks.tell(step("a"))  # late
    assert len(heard) == 3 and tasks.steps_per_s == 0.1


def test_one_rank_that_failed_counts_more_than_others_that_did_not() -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a")
    tasks.take(0, 1)
    tasks.tell(Ended(id="a"))
    tasks.tell(Ended(id="a", failure=FULL))
    tasks.finish(0)
    assert heard.ends() == ["out_of_memory"]


@pytest.mark.parametrize(
    ("told", "code"),
    [(FULL, "out_of_memory"), (Failure(code="generation_failed", message=""), "rank_died"), (None, "rank_died")],
)
def test_a_group_that_is_gone_ends_what_it_worked_on(told: Failure | None, code: str) -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a", "b")
    tasks.take(0, 1)
    if told is not None:
        tasks.tell(Ended(id="a", failure=told))
    tasks.fail(0, DIED)
    assert heard.ends() == [code] and tasks.num_waiting == 1
    tasks.fail(0, DIED)
    tasks.fail_waiting(DIED)
    assert heard.ends() == [code, "rank_died"]


def test_nothing_of_a_cancelled_order_follows_and_it_never_completes() -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a")
    tasks.take(3, 1)
    assert tasks.cancel("a") == 3
    tasks.tell(step("a"))
    tasks.tell(Ended(id="a"))
    assert [type(event) for event in heard] == [Began]
    tasks.finish(3)
    assert heard.ends() == ["cancelled"] and tasks.cancel("a") is None


def test_what_waits_is_cancelled_at_once() -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a")
    assert tasks.cancel("a") is None and heard.ends() == ["cancelled"] and tasks.take(0, 1) == []


def test_an_id_is_used_once_at_a_time() -> None:
    tasks = tasks_of(Heard(), "a")
    with pytest.raises(ValueError, match="under way"):
        tasks.put(Order(id="a", request=GenerationRequest(), folder=""), print)


def test_what_a_listener_raises_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    heard = Heard()
    tasks = tasks_of(heard, "a")

    def fail(event: OrderEvent) -> None:
        raise KeyError("of the listener")

    tasks.put(Order(id="b", request=GenerationRequest(), folder=""), fail)
    tasks.take(0, 2)
    tasks.take(0, 1)
    tasks.finish(0)
    assert heard.ends() == [None] and tasks.of_group(0) == [] and "of the listener" in capsys.readouterr().err

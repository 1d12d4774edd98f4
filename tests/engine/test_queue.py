"""Who is next, and how long it takes."""

from __future__ import annotations

import pytest

from penstock.engine.queue import Queue
from penstock.errors import QueueFullError
from penstock.request import GenerationRequest
from penstock.wire import Order


def waiting(*ids: str, max_size: int = 10) -> Queue:
    """A queue of orders called `client.number`."""
    queue = Queue(max_size)
    for order_id in ids:
        client = order_id.partition(".")[0]
        queue.put(Order(id=order_id, request=GenerationRequest(prompt=order_id), folder="", client=client))
    return queue


def taken(queue: Queue) -> list[str]:
    found = []
    while orders := queue.take():
        found += [order.id for order in orders]
    return found


def test_clients_take_turns() -> None:
    assert taken(waiting("a.1", "a.2", "a.3", "b.1", "c.1", "b.2")) == ["a.1", "b.1", "c.1", "a.2", "b.2", "a.3"]


def test_a_newcomer_does_not_wait_for_all_of_anothers() -> None:
    queue = waiting("a.1", "a.2", "a.3")
    assert queue.take()[0].id == "a.1"
    queue.put(Order(id="b.1", request=GenerationRequest(), folder="", client="b"))
    assert taken(queue) == ["a.2", "b.1", "a.3"]


def test_positions_are_the_order_of_taking() -> None:
    queue = waiting("a.1", "a.2", "b.1")
    places = {order_id: queue.position(order_id) for order_id in ("a.1", "b.1", "a.2")}
    assert [place[0] for place in places.values() if place] == [0, 1, 2]
    queue.learn(4.0)
    first, last = queue.position("a.1"), queue.position("a.2")
    assert first == (0, 2.0) and last == (2, 10.0) and queue.position("x") is None


def test_a_full_queue_says_when_to_come_back() -> None:
    queue = waiting("a.1", "a.2", max_size=2)
    queue.learn(3.2)
    with pytest.raises(QueueFullError):
        queue.require_room()
    with pytest.raises(QueueFullError, match=r"2 requests wait already, and at most max_queue\(2\)") as caught:
        queue.put(Order(id="b.1", request=GenerationRequest(), folder=""))
    assert caught.value.retry_after_s == 4 and len(queue) == 2
    queue.take()
    queue.require_room()


def test_batches_take_what_goes_with_the_first() -> None:
    queue = waiting("a.1", "b.1", "a.2", "b.2", "a.3")
    orders = queue.take(3, lambda first, other: first.client == other.client)
    assert [order.id for order in orders] == ["a.1", "a.2", "a.3"]
    assert taken(queue) == ["b.1", "b.2"]


def test_what_is_removed_is_not_taken() -> None:
    queue = waiting("a.1", "b.1")
    removed = queue.remove("a.1")
    assert removed is not None and removed.id == "a.1"
    assert queue.remove("a.1") is None and taken(queue) == ["b.1"] and len(queue) == 0


def test_the_mean_follows_what_is_learnt() -> None:
    queue = waiting("a.1")
    for duration_s in (10.0, 20.0):
        queue.learn(duration_s)
    assert queue.position("a.1") == (0, 6.5)

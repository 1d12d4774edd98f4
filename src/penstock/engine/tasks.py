"""The orders that an engine has accepted: who waits, who runs, who hears of it, and how each ends exactly once.

Owns the queue and what listeners are told. Does not know ranks beyond the number of their group.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from penstock.engine.batches import goes_with
from penstock.engine.queue import Queue
from penstock.wire import Began, Ended, Failure, Order, OrderEvent, Step

Listener = Callable[[OrderEvent], None]

CANCELLED = Failure(code="cancelled", message="The request was cancelled.")
_WINDOW_S = 10.0


@dataclass
class _Task:
    """An order under way.

    Attributes:
        order: what it is.
        listener: who hears of it.
        asked_s: when it was accepted, on the monotonic clock.
        group: the number of the group that works on it; None while it waits.
        begun_s: when that began.
        said: what ranks said of its end so far; a failure counts more.
        is_cancelled: whether somebody wished its end.
    """

    order: Order
    listener: Listener
    asked_s: float
    group: int | None = None
    begun_s: float = 0.0
    said: Ended | None = None
    is_cancelled: bool = False

    def tell(self, event: OrderEvent) -> None:
        """Have the listener hear of something; what it raises is its own."""
        try:
            self.listener(event)
        except Exception:  # it runs in the thread that all orders need
            traceback.print_exc()


class Tasks:
    """All orders that were accepted and have not ended; whoever uses it from several threads holds a lock.

    Args:
        max_queue: orders that may wait.
        num_groups: that take them.
    """

    def __init__(self, max_queue: int, num_groups: int) -> None:
        self._queue = Queue(max_queue, num_groups)
        self._tasks: dict[str, _Task] = {}
        self._stepped_s: deque[float] = deque()

    @property
    def num_waiting(self) -> int:
        """Orders in the queue."""
        return len(self._queue)

    @property
    def steps_per_s(self) -> float:
        """Denoising steps per second over the last ten seconds."""
        self._forget_steps()
        return len(self._stepped_s) / _WINDOW_S

    def put(self, order: Order, listener: Listener) -> None:
        """Let an order wait.

        Raises:
            QueueFullError: where too many do.
            ValueError: for an id that is under way already.
        """
        if order.id in self._tasks:
            raise ValueError(f"order {order.id} is under way already")
        self._queue.put(order)
        self._tasks[order.id] = _Task(order, listener, time.monotonic())

    def require_room(self) -> None:
        """See `Queue.require_room`."""
        self._queue.require_room()

    def position(self, order_id: str) -> tuple[int, float] | None:
        """See `Queue.position`."""
        return self._queue.position(order_id)

    def take(self, group: int, most: int) -> list[Order]:
        """Have a group begin the next orders, as one batch; nothing where none waits."""
        orders = self._queue.take(most, goes_with)
        for order in orders:
            task = self._tasks[order.id]
            task.group, task.begun_s = group, time.monotonic()
            task.tell(Began(id=order.id, group=group))
        return orders

    def of_group(self, group: int) -> list[str]:
        """Ids of the orders that a group works on."""
        return [task.order.id for task in self._tasks.values() if task.group == group]

    def cancel(self, order_id: str) -> int | None:
        """Wish an order's end: one that waits ends at once.

        Returns:
            The number of the group that must be told; None where there is none.
        """
        task = self._tasks.get(order_id)
        if task is None:
            return None
        task.is_cancelled = True
        if task.group is None:
            self._queue.remove(order_id)
            self._end(task, CANCELLED)
        return task.group

    def tell(self, event: OrderEvent) -> None:
        """Pass on what a rank says of an order; of its end nothing is passed on before `finish`."""
        task = self._tasks.get(event.id)
        if task is None:
            return
        if isinstance(event, Ended):
            if task.said is None or (event.failure is not None and task.said.failure is None):
                task.said = event
            return
        if isinstance(event, Step) and event.event.step:
            self._stepped_s.append(time.monotonic())
            self._forget_steps()
        if not task.is_cancelled:
            task.tell(event)

    def finish(self, group: int) -> None:
        """End what a group worked on: all its ranks have let go."""
        for task in self._of(group):
            self._queue.learn(time.monotonic() - task.begun_s)
            self._end(task, task.said.failure if task.said is not None else None)

    def fail(self, group: int, failure: Failure) -> None:
        """End what a group worked on: its ranks are gone.

        What a rank said of its own failure before, such as too little memory, counts more; not that the call failed,
        which may be because the others are gone.
        """
        for task in self._of(group):
            told = task.said.failure if task.said is not None else None
            self._end(task, failure if told is None or told.code == "generation_failed" else told)

    def fail_waiting(self, failure: Failure) -> None:
        """End all orders that wait."""
        for task in [task for task in self._tasks.values() if task.group is None]:
            self._queue.remove(task.order.id)
            self._end(task, failure)

    def _of(self, group: int) -> list[_Task]:
        return [task for task in self._tasks.values() if task.group == group]

    def _end(self, task: _Task, failure: Failure | None) -> None:
        del self._tasks[task.order.id]
        now_s = time.monotonic()
        begun_s = task.begun_s if task.group is not None else now_s
        said = task.said or Ended(id=task.order.id)
        timings = msgspec.structs.replace(said.timings, queue_s=begun_s - task.asked_s, total_s=now_s - task.asked_s)
        if task.is_cancelled:
            failure = CANCELLED
        task.tell(Ended(id=task.order.id, timings=timings, failure=failure))

    def _forget_steps(self) -> None:
        while self._stepped_s and time.monotonic() - self._stepped_s[0] > _WINDOW_S:
            self._stepped_s.popleft()

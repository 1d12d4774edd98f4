"""Orders that wait for ranks: so many at most, clients in turn.

Owns who is next. Does not know ranks; whoever uses it from several threads holds a lock.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from penstock.errors import QueueFullError
from penstock.wire import Order

_FIRST_GUESS_S = 10.0
_WEIGHT = 0.3  # of the newest duration in the running mean


@dataclass
class Queue:
    """A bounded queue that is fair between clients: each client's orders in their order, clients one after the other.

    Args:
        max_size: orders that may wait.
        num_groups: that take orders, for estimates.
    """

    max_size: int
    num_groups: int = 1
    _lines: OrderedDict[str, deque[Order]] = field(default_factory=OrderedDict)
    _mean_s: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, order: Order) -> None:
        """Let an order wait.

        Raises:
            QueueFullError: see `require_room`.
        """
        self.require_room()
        self._lines.setdefault(order.client, deque()).append(order)

    def require_room(self) -> None:
        """Refuse where no order could wait.

        Raises:
            QueueFullError: with the seconds until there may be room.
        """
        if len(self) >= self.max_size:
            retry_s = max(1, math.ceil(self._duration_s() / self.num_groups))
            raise QueueFullError(
                f"{len(self)} requests wait already, and at most max_queue({self.max_size}) may: ask again in "
                f"{retry_s} s, or start the server with a larger --max-queue.",
                retry_s,
            )

    def take(
        self, most: int = 1, goes_with: Callable[[Order, Order], bool] = lambda first, other: False
    ) -> list[Order]:
        """The next order, and others that may run with it as one batch; nothing where none waits.

        Args:
            most: orders to take.
            goes_with: whether the second of two orders can share a batch with the first.
        """
        if not self._lines:
            return []
        first = next(self._in_turn())
        taken = [first, *(order for order in self._in_turn() if order is not first and goes_with(first, order))][:most]
        for order in taken:
            self.remove(order.id)
        if first.client in self._lines:
            self._lines.move_to_end(first.client)
        return taken

    def remove(self, order_id: str) -> Order | None:
        """Take an order out, wherever it stands; None where it does not wait."""
        for client, line in self._lines.items():
            for order in line:
                if order.id == order_id:
                    line.remove(order)
                    if not line:
                        del self._lines[client]
                    return order
        return None

    def position(self, order_id: str) -> tuple[int, float] | None:
        """How many orders are before one, and about how many seconds they take; None where it does not wait."""
        for place, order in enumerate(self._in_turn()):
            if order.id == order_id:
                return place, round((place / self.num_groups + 0.5) * self._duration_s(), 1)
        return None

    def learn(self, duration_s: float) -> None:
        """Count how long an order has taken, for estimates."""
        known_s = duration_s if self._mean_s is None else self._mean_s
        self._mean_s = known_s + _WEIGHT * (duration_s - known_s)

    def _duration_s(self) -> float:
        return _FIRST_GUESS_S if self._mean_s is None else self._mean_s

    def _in_turn(self) -> Iterator[Order]:
        """All that wait, in the order in which they will be taken."""
        lines = [list(line) for line in self._lines.values()]
        for place in range(max(map(len, lines), default=0)):
            for line in lines:
                if place < len(line):
                    yield line[place]

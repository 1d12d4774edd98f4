"""The order in which the streamed blocks of a component run: supposed at first, corrected by what really ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Schedule(Generic[T]):
    """A cyclic order of blocks, and where in it the component is.

    Args:
        order: the blocks in the order of their definition.
    """

    def __init__(self, order: Sequence[T]) -> None:
        self.order = list(order)
        self._position = -1
        self._ran: list[T] = []
        self._is_first = True

    def begin(self) -> None:
        """A forward of the component begins."""
        self._position = -1
        self._ran = []

    def advance(self, block: T) -> None:
        """A block runs; one that is not the next is looked for further on, then from the begin."""
        self._ran.append(block)
        length = len(self.order)
        for distance in range(1, length + 1):
            at = (self._position + distance) % length
            if self.order[at] == block:
                self._position = at
                return

    def place_of(self, block: T) -> int:
        """Where in the order a block first comes; behind all others where it was never seen to run."""
        return self.order.index(block) if block in self.order else len(self.order)

    def upcoming(self, count: int, wraps: bool) -> list[T]:
        """The next blocks, at most `count`, each once; past the end only where the component `wraps` around."""
        found: list[T] = []
        for distance in range(1, count + 1):
            at = self._position + distance
            if at >= len(self.order) and not wraps:
                break
            block = self.order[at % len(self.order)]
            if block in found:
                break
            found.append(block)
        return found

    def end(self) -> None:
        """A forward is over: keep its order where it was the first, or contradicts the one supposed.

        A forward that only left blocks out (a cache, a conditional layer) contradicts nothing.
        """
        if self._ran and (self._is_first or not _is_within(self._ran, self.order)):
            self.order = self._ran
        self._is_first = False
        self._position = -1


def _is_within(part: Sequence[T], whole: Sequence[T]) -> bool:
    """Whether `part` is `whole` with some left out."""
    rest = iter(whole)
    return all(any(item == other for other in rest) for item in part)

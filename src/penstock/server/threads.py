"""Threads for what blocks, in lanes: where one kind of work is slow, the others have their threads all the same.

Owns how many threads each kind of work may take. Does not know the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Lane:
    """Threads for one kind of work.

    Args:
        name: of the kind.
        num_threads: at most, in each event loop.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._num_threads = num_threads
        self._limiter: RunVar[CapacityLimiter] = RunVar(f"penstock-{name}")

    async def run(self, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        """Do something in a thread of this lane, once one is free.

        Raises:
            Exception: whatever the work raises.
        """
        return await to_thread.run_sync(work, *arguments, limiter=self._of_loop())

    def _of_loop(self) -> CapacityLimiter:
        """The limiter of the running event loop: it cannot be shared between loops."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._num_threads)
            self._limiter.set(limiter)
        return limiter


DATABASE = Lane("database", 16)
"""Asks and changes records."""

FILES = Lane("files", 16)
"""Reads, writes and removes files of this machine."""

CODING = Lane("coding", 4)
"""Decodes pictures, videos and texts of megabytes, and encodes them: work for a processor."""

WAITING = Lane("waiting", 4)
"""Waits for the engine."""

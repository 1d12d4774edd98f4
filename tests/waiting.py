"""Waits for what is to happen, however busy the machine is: tests wait for events, never for the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LIMIT_S = 120.0
"""After which something counts as never happening: a machine may be many times slower than this one."""


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Returns as soon as a condition holds.

    Args:
        condition: Asked every 10 ms.
        limit_s: Seconds after which it is taken for wrong.

    Raises:
        AssertionError: It never held.
    """
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"still not so after {limit_s:g} s"
        time.sleep(0.01)


def threads_of(prefix: str) -> set[str]:
    """The names of threads that are alive and begin with something."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)}


def has_ended(prefix: str = "penstock", limit_s: float = LIMIT_S) -> bool:
    """Waits until all threads whose names begin with something have ended; whoever asked them to need not wait."""
    wait_until(lambda: not threads_of(prefix), limit_s)
    return True

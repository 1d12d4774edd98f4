"""Ctrl-C: at once where nothing is at stake, as an exception where files are being made.

A signal handler's exception may be turned into another one (inside an import) or be swallowed (inside a `__del__`):
a process that is still starting therefore simply leaves, and a running one asks again at every step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, with exit code 130 and one line."""
    signal.signal(signal.SIGINT, _leave)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that what was begun can be tidied up.

    Yields:
        A function to call at every step: it raises again where the first exception was swallowed.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: Any) -> None:
    line = "interrupted; no unfinished file is left behind.\n"
    os.write(2, (_SHOW_CURSOR + line if sys.stderr.isatty() else line).encode())
    os._exit(INTERRUPTED)

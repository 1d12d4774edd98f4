"""Ctrl-C: at once where nothing is at stake, as an exception where files are being made.

A signal handler's exception may be turned into another one (inside an import) or be swallowed (inside a `__del__`):
a process that is still starting therefore simply leaves, and a running one asks again at every step. A rank of our own
launcher is interrupted by SIGTERM: the launcher alone hears the terminal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from penstock.distributed.launcher import is_launched

INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, with exit code 130 and one line."""
    signal.signal(_number(), _leave)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that what was begun can be tidied up.

    Yields:
        A function to call at every step: it raises again where the first exception was swallowed.

    Raises:
        KeyboardInterrupt: in place of whatever else was raised once it was asked for: exchanges fail when other ranks
            leave first.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(_number(), ask)
    try:
        yield check
    finally:
        signal.signal(_number(), before)
        if asked and sys.exc_info()[0] is not None:
            raise KeyboardInterrupt


def _number() -> signal.Signals:
    return signal.SIGTERM if is_launched() else signal.SIGINT


def _leave(number: int, frame: Any) -> None:
    line = "interrupted; no unfinished file is left behind.\n"
    os.write(2, (_SHOW_CURSOR + line if sys.stderr.isatty() else line).encode())
    os._exit(INTERRUPTED)

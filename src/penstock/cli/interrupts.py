"""Ctrl-C: at once where nothing is at stake, as an exception where files are being made.

A signal handler's exception may be turned into another one (inside an import) or be swallowed (inside a `__del__`):
a process that is still starting therefore simply leaves, and a running one asks again at every step. A rank of our own
launcher is interrupted by SIGTERM: the launcher alone hears the terminal. Where the launcher ends it because another
rank failed, the same happens without a word: the launcher says who failed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from penstock.distributed.launcher import DISMISSED, is_launched

INTERRUPTED = 130
_SHOW_CURSOR = "\x1b[?25h"


class Dismissal(KeyboardInterrupt):
    """The launcher ends this rank because another one failed; raised in place of an interrupt, handled alike."""


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, with exit code 130 and one line."""
    for number in _numbers():
        signal.signal(number, _leave)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that what was begun can be tidied up.

    Yields:
        A function to call at every step: it raises again where the first exception was swallowed.

    Raises:
        KeyboardInterrupt: in place of whatever else was raised once it was asked for: exchanges fail when other ranks
            leave first. A `Dismissal` where nobody has asked but the launcher, after another rank's failure.
    """
    asked: type[KeyboardInterrupt] | None = None

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = asked or (Dismissal if number == DISMISSED else KeyboardInterrupt)
        raise asked

    def check() -> None:
        if asked is not None:
            raise asked

    before = {number: signal.signal(number, ask) for number in _numbers()}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked is not None and sys.exc_info()[0] is not None:
            raise asked


def _numbers() -> tuple[signal.Signals, ...]:
    return (signal.SIGTERM, DISMISSED) if is_launched() else (signal.SIGINT,)


def _leave(number: int, frame: Any) -> None:
    line = "" if number == DISMISSED else "interrupted; no unfinished file is left behind.\n"
    os.write(2, (_SHOW_CURSOR + line if sys.stderr.isatty() else line).encode())
    os._exit(INTERRUPTED)

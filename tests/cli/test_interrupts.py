from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest

from penstock.cli.interrupts import interruptible


def test_interrupt_is_an_exception_where_files_are_made_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_that_was_swallowed_is_raised_again_at_the_next_step() -> None:
    with interruptible() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):  # as a `__del__` does
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()


def test_interrupt_while_starting_cannot_be_swallowed() -> None:
    code = """
import signal
from penstock.cli.interrupts import leave_on_interrupt
leave_on_interrupt()
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "interrupted; no unfinished file is left behind.\n"

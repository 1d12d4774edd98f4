from __future__ import annotations

import contextlib
import os
import signal
import sys

import pytest

from penstock.cli.interrupts import Dismissal, interruptible
from tests import processes


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


def test_dismissal_is_an_interrupt_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank of our own launcher: SIGUSR1 after another's failure, SIGTERM for the user's Ctrl-C."""
    monkeypatch.setenv("PENSTOCK_LAUNCHER", "1")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Dismissal), interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)
        raise RuntimeError("an exchange fails as others leave")
    assert signal.getsignal(signal.SIGUSR1) is before
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert not isinstance(caught.value, Dismissal)


@pytest.mark.parametrize(("name", "said"), [("SIGUSR1", ""), ("SIGTERM", "interrupted; no unfinished file")])
def test_rank_that_is_dismissed_while_starting_says_nothing(name: str, said: str) -> None:
    code = f"""
import signal
from penstock.cli.interrupts import leave_on_interrupt
leave_on_interrupt()
signal.raise_signal(signal.{name})
"""
    done = processes.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PENSTOCK_LAUNCHER": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)


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
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "interrupted; no unfinished file is left behind.\n"

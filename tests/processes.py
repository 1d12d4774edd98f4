"""Every process that a test starts: it ends with the test, whatever happens to either.

    with Process([sys.executable, "-c", "..."], stdout=PIPE, text=True) as process: ...
    done = run([sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True)
    code = forked(lambda: 3)

A process has a session of its own, which is killed on leaving together with all that carries its mark; it ends as well
when the test's own process is killed. No other file of the tests starts processes (`test_house.py`), but for the ranks
that are kept for the whole run (`ranks.py`).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, TimeoutExpired
from typing import Any, AnyStr, Self

from penstock.distributed.launcher import bound, end_with

__all__ = ["DEVNULL", "PIPE", "STDOUT", "CompletedProcess", "Fork", "Process", "TimeoutExpired", "forked", "run"]

MARK = "PENSTOCK_TEST_MARK"
"""Variable that tells the processes of one test's process from all others."""

_POLL_S = 0.005


class Process(subprocess.Popen[AnyStr]):
    """A process that is killed, with all that it has started, when its block is left. The arguments are `Popen`'s.

    Must be started by a thread that lives as long as the process shall.
    """

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        self.mark = secrets.token_hex(8)
        environment = {**(options.pop("env", None) or os.environ), MARK: self.mark}
        options.setdefault("start_new_session", True)
        super().__init__(bound([str(word) for word in command]), env=environment, **options)
        self.args = [*command]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.kill_all()
        super().__exit__(*exception)

    def kill_all(self) -> None:
        """Kill it, its session, and whatever else carries its mark, until nothing is left of them."""
        while left := self.left():
            for pid in left:
                send(pid, signal.SIGKILL)
            if self.returncode is None:
                self.wait()
            time.sleep(_POLL_S)

    def left(self) -> list[int]:
        """Which of its processes run."""
        is_ours = self.returncode is None  # the session's number may be another's once its first process is reaped
        return [
            pid
            for pid in pids()
            if (is_ours and session_of(pid) == self.pid) or mark_of(pid) == self.mark  # such as a session of its own
        ]


def run(
    command: Sequence[str | Path],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> CompletedProcess[Any]:
    """What `subprocess.run` does, with a `Process`."""
    if capture_output:
        options.update(stdout=PIPE, stderr=PIPE)
    if input is not None:
        options["stdin"] = PIPE
    with Process[Any](command, **options) as process:
        out, err = process.communicate(input, timeout)
    done = CompletedProcess(command, process.returncode, out, err)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}: {out!r} {err!r}")
    return done


class Fork:
    """A fork of this process that does something, and is killed when its block is left.

    Args:
        act: returns an exit code, or None for 0; an exception is 1.
        timeout_s: after which it is killed by SIGALRM.
    """

    def __init__(self, act: Callable[[], object], timeout_s: int = 60) -> None:
        parent = os.getpid()
        self._code: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            self.pid = os.fork()
        if self.pid == 0:
            code: Any = 1
            try:
                signal.alarm(timeout_s)
                end_with(parent)
                code = act() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill it, and wait until it has ended."""
        if self._code is None:
            send(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Wait until it has ended; its exit code, -n for signal n."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def forked(act: Callable[[], object]) -> int:
    """The exit code of a fork that does something; see `Fork`."""
    with Fork(act) as child:
        return child.wait()


def marked(mark: str) -> list[int]:
    """The processes that run and carry a mark, or one that begins with it."""
    return [pid for pid in pids() if mark_of(pid).startswith(mark)]


def await_that(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: where it is not after so long, whatever else the machine does.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(4 * _POLL_S)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def pids() -> Iterator[int]:
    """All processes that run, and are not only waiting to be reaped."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and is_running(int(folder.name)):
            yield int(folder.name)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not only waiting to be reaped."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def session_of(pid: int) -> int:
    """The session of a process; 0 where it has ended."""
    fields = _stat(pid)
    return int(fields[3]) if fields else 0


def mark_of(pid: int) -> str:
    """The mark that a process was started with; empty where it has none."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended, or another user's
        return ""
    prefix = f"{MARK}=".encode()
    return next((one.removeprefix(prefix).decode() for one in variables if one.startswith(prefix)), "")


def _stat(pid: int) -> list[str]:
    """From its state on, the fields that the kernel tells of a process; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return []

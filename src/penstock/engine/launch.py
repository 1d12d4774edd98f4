"""Start the ranks of a run on this machine, and end them all: when they are done, when one fails, when asked to.

    shell -> this process (no torch) -> rank 0 (the user's terminal), rank 1, ... (silent; standard error kept)

Owns when they are started and ended, and the signals. A launcher passes Ctrl-C and SIGTERM on as one SIGTERM each: its
ranks never see the terminal's own. Those that outlive a rank which failed are told so by `DISMISSED` instead. Does not
know what the ranks do; what they owe in turn is `distributed/launcher.py`.
"""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from subprocess import DEVNULL
from typing import Any

from penstock.distributed.environment import LOOPBACK
from penstock.distributed.launcher import DISMISSED, ERRORS, LISTENER
from penstock.engine.processes import RankProcess, rank_variables, require_startable, start

_POLL_S = 0.05
_GRACE_S = 3.0
_WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


@dataclass
class _Wishes:
    """The signals that this process was sent, in order."""

    numbers: list[int] = field(default_factory=list)

    def add(self, number: int, frame: Any) -> None:
        """Note one; a signal handler."""
        self.numbers.append(number)


def launch(command: Sequence[str], num_ranks: int, *, equation: str = "", grace_s: float = _GRACE_S) -> int:
    """Run a command as several ranks on this machine, until all have ended.

    Rank 0 has this process's terminal; the others print nowhere, but what a failing one said on standard error
    is shown, unless rank 0 told the user the same (`launcher.tell`). A signal during the start ends the ranks that
    there are, and no more are started.

    Args:
        command: of each rank.
        num_ranks: how many.
        equation: what makes that number, in words.
        grace_s: once a rank has failed, the others have so long to end by themselves, then as long to tidy up when
            they are asked to end; who still runs is killed. After Ctrl-C they are asked at once.

    Returns:
        0, or the exit code of the rank that failed first, 128 + n for signal n; where this process was sent a
        signal, 128 + n for that: 130 after Ctrl-C.

    Raises:
        ConfigError: for more ranks than this machine can reasonably have, before any is started.
        OSError: where not all could be started; those that were have ended.
    """
    require_startable(num_ranks, equation)
    wishes = _Wishes()
    with ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        stack.enter_context(_heard(wishes))
        ranks: list[RankProcess] = []
        stack.callback(_kill, ranks)
        handed = {ERRORS: errors.fileno(), LISTENER: listener.fileno()}
        shared = rank_variables(num_ranks, num_ranks, listener.getsockname()[1])
        while len(ranks) < num_ranks and not wishes.numbers:
            with _held(signal.SIGINT):  # ranks inherit that it is held back, and so never see the terminal's
                ranks.append(_start(command, len(ranks), shared, handed, stack))
        failed = _wait(ranks, wishes, grace_s)
        if len(ranks) == num_ranks and not any(rank.process.returncode for rank in ranks):
            return 0
        if wishes.numbers or failed is None:
            return 128 + wishes.numbers[0]
        errors.seek(0)
        _explain(failed, errors.read().decode(errors="replace"))
        return _exit_code(failed)


def _start(
    command: Sequence[str], number: int, shared: Mapping[str, str], handed: Mapping[str, int], stack: ExitStack
) -> RankProcess:
    """Start one rank; only rank 0 is handed the open files."""
    own = {"RANK": str(number), "LOCAL_RANK": str(number)}
    if number == 0:
        own.update((name, str(file)) for name, file in handed.items())
        return RankProcess(0, start(command, {**shared, **own}, pass_fds=tuple(handed.values())), None)
    said = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    process = start(command, {**shared, **own}, stdin=DEVNULL, stdout=DEVNULL, stderr=said)
    return RankProcess(number, process, said)


def _wait(ranks: list[RankProcess], wishes: _Wishes, grace_s: float) -> RankProcess | None:
    """Wait until all have ended, or have been ended; the one that failed first, None where none did."""
    running = list(ranks)
    failed: RankProcess | None = None
    ending: _Ending | None = None
    num_heard = 0
    while running:
        for rank in [rank for rank in running if rank.process.poll() is not None]:
            running.remove(rank)
            if rank.process.returncode and failed is None:
                failed = rank
                ending = ending or _Ending(DISMISSED, asks_after_s=grace_s, kills_after_s=2 * grace_s)
        if len(wishes.numbers) > num_heard:
            is_patient = num_heard == 0 and len(wishes.numbers) == 1
            num_heard = len(wishes.numbers)
            ending = _Ending(signal.SIGTERM, asks_after_s=0, kills_after_s=grace_s if is_patient else 0)
        if ending is not None:
            ending.go_on(running)
        time.sleep(_POLL_S if running else 0)
    return failed


class _Ending:
    """Ends ranks: first it waits, then it asks by a signal, then it kills."""

    def __init__(self, number: signal.Signals, asks_after_s: float, kills_after_s: float) -> None:
        begun_s = time.monotonic()
        self._asks_s, self._kills_s = begun_s + asks_after_s, begun_s + kills_after_s
        self._number = number
        self._has_asked = False

    def go_on(self, running: list[RankProcess]) -> None:
        """Do to those that still run what it is time for."""
        now_s = time.monotonic()
        if now_s >= self._kills_s:
            _kill(running)
            running.clear()
        elif now_s >= self._asks_s and not self._has_asked:
            self._has_asked = True
            for rank in running:
                rank.process.send_signal(self._number)


def _kill(ranks: list[RankProcess]) -> None:
    """End at once what still runs, and reap it."""
    left = [rank for rank in ranks if rank.process.poll() is None]
    for rank in left:
        rank.kill()
    for rank in left:
        rank.process.wait()
    if any(rank.number == 0 for rank in left) and sys.stderr.isatty():
        print(_SHOW_CURSOR, end="", file=sys.stderr, flush=True)  # its bars hid it


def _exit_code(rank: RankProcess) -> int:
    code = rank.process.returncode
    return 128 - code if code < 0 else code


def _explain(failed: RankProcess, told: str) -> None:
    """Say which rank failed and show what it said; nothing where rank 0 has told the user the same."""
    code = failed.process.returncode
    tail = failed.tail()
    if code > 0 and (failed.number == 0 or (told.strip() and " ".join(told.split()) in " ".join(tail.split()))):
        return
    first = f"rank {failed.number} failed ({failed.how_it_ended}){':' if tail else '.'}"
    print(first, *filter(None, [tail]), sep="\n", file=sys.stderr)


@contextmanager
def _heard(wishes: _Wishes) -> Iterator[None]:
    """Inside, the signals that end a process are only noted."""
    heeded = [number for number in _WISHES if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, wishes.add) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    """Inside, a signal waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

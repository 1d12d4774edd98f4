"""No rank waits for ever: who raises tells the others, and whoever still waits for it then ends.

A blocked collective cannot be interrupted, so a thread beside it asks the ranks' store once a second who failed, and
ends the process after a grace in which a rank may raise by itself. Owns what ranks tell each other through the store;
does not know what they compute.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist

from penstock.distributed.launcher import is_launched
from penstock.errors import GenerationError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_S = 1.0
_GRACE_S = 5.0
_STORE_TIMEOUT = timedelta(seconds=3)
_VISIBLE_S = 0.5
_NO_STORE = "rank 0 is gone, which kept the ranks together"
_LAST_S = 600.0  # how long rank 0 stays for others whose end it cannot see, on another machine
_watch: tuple[dist.ProcessGroup, Watch] | None = None


@dataclass(frozen=True)
class Call:
    """What ranks do together.

    Attributes:
        ranks: that do.
        number: which of their calls, counted from 1.
    """

    ranks: tuple[int, ...]
    number: int


@dataclass(frozen=True)
class Failure:
    """What a rank raised.

    Attributes:
        rank: that raised.
        call: in which it did.
        turn: how many calls it had entered by then, with whichever ranks.
        traceback: as Python prints it.
    """

    rank: int
    call: Call
    turn: int
    traceback: str

    @property
    def line(self) -> str:
        """The traceback's last line: the error itself."""
        return self.traceback.strip().splitlines()[-1]


def current_watch(ranks: Sequence[int] | None = None) -> Watch | None:
    """The watch of this process, over torch's default process group; made once per group.

    Args:
        ranks: that make the next call together, this one among them; all where left out. Inside a call it changes
            nothing: the ranks of that call are watched until it is left.

    Returns:
        None without a process group, and for one rank alone: `with current_watch(ranks) or nullcontext(): ...`.

    Cost: a few small messages to the store the first time, later none.
    """
    global _watch
    world = dist.group.WORLD if dist.is_initialized() else None
    ranks = tuple(range(dist.get_world_size()) if ranks is None else ranks) if world is not None else ()
    if world is None or len(ranks) <= 1:
        return None
    if _watch is None or _watch[0] is not world:
        store = dist.distributed_c10d._get_default_store()
        _watch = (world, Watch(store, dist.get_rank(), dist.get_world_size()))
    _watch[1].attend(ranks)
    return _watch[1]


class Watch:
    """A context around every call that ranks make together; those of one group enter it equally often.

    Calls are counted for each group of ranks by itself. Inside, a rank that is left waiting by another ends its
    process with exit code 1 and that rank's traceback. Where every rank raises by itself, nothing ends, and the next
    call works. Entering it again inside does nothing.

    Args:
        store: of the process group. Rank 0 keeps it, and waits at its exit until the others need it no longer.
        rank: of this process.
        world_size: number of ranks.
        poll_s: seconds between two looks at the store.
        grace_s: seconds in which a rank may leave a call by itself, once another has failed.

    Raises:
        GenerationError: on leaving, where an exchange failed because another rank did, or is gone: names that rank.

    Cost: two small messages to the store per call, and one per `poll_s` inside.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, poll_s: float = _POLL_S, grace_s: float = _GRACE_S
    ) -> None:
        self._rank = rank
        self._ranks = tuple(range(world_size))
        self._world = [other for other in self._ranks if other != rank]
        self._poll_s, self._grace_s = poll_s, grace_s
        self._board = _Board(store)  # of the thread that calls; the one that looks has its own
        self._call = Call(self._ranks, 0)
        self._numbers: Counter[tuple[int, ...]] = Counter()
        self._depth = 0
        self._own_failures: set[Call] = set()
        self._inside = threading.Event()
        self._board.move_in(rank)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(_Board(store),), name="penstock-watch", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def attend(self, ranks: Sequence[int]) -> None:
        """Watch these ranks from the next call on, and no others."""
        self._ranks = tuple(ranks)

    def __enter__(self) -> Self:
        if not self._depth:
            call = Call(self._ranks, self._numbers[self._ranks] + 1)
            numbers = self._numbers + Counter([self._ranks])
            try:
                self._board.place(self._rank, _Place(numbers, call.ranks))
            except RuntimeError as error:
                raise GenerationError(f"{_NO_STORE}. Start all ranks again.") from error
            self._call, self._numbers = call, numbers
            self._inside.set()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._inside.clear()
        reason = None
        try:
            if error is not None:
                self._own_failures.add(self._call)
                text = "".join(traceback.format_exception(error))
                told = Failure(self._rank, self._call, self._numbers.total(), text)
                num_before = self._board.publish(told)
                reason = self._reason(told, num_before) if _is_exchange(error) else None
            self._board.place(self._rank, _Place(self._numbers))
        except RuntimeError:
            reason = _NO_STORE if error is not None and _is_exchange(error) else None
        if reason is not None:
            raise GenerationError(f"{reason}. Start all ranks again.") from error

    def _reason(self, own: Failure, num_before: int) -> str | None:
        """Which other rank made an exchange fail; None where this rank is to blame itself."""
        for failure in self._board.failures()[:num_before]:
            if failure.rank == self._rank or failure.call != own.call:
                continue
            if failure.line == own.line:
                return None
            return f"rank {failure.rank} failed: {failure.line.rstrip('.')}"
        deadline_s = time.monotonic() + _VISIBLE_S
        while time.monotonic() < deadline_s:  # its connections end a moment before its process does
            gone = self._gone(self._board, own.call)
            if gone is not None:
                return gone
            time.sleep(_VISIBLE_S / 10)
        return None

    def _look(self, board: _Board) -> None:
        """While inside a call, look for who keeps this rank waiting; end the process once the grace is over."""
        blamed: tuple[Call, float, str] | None = None  # in which call, since when, and who
        while not self._ended.wait(self._poll_s):
            call = self._call
            try:
                text = self._blame(board, call) if self._inside.is_set() else None
            except RuntimeError:
                text = _NO_STORE
            if text is None or (self._call, self._inside.is_set()) != (call, True):
                blamed = None
            elif blamed is None or blamed[0] != call:
                blamed = (call, time.monotonic(), text)
            elif time.monotonic() - blamed[1] >= self._grace_s:
                print(f"rank {self._rank} ends: {blamed[2]}", file=sys.stderr, flush=True)
                os._exit(1)

    def _blame(self, board: _Board, call: Call) -> str | None:
        """Who failed, or is gone, so that this rank waits for it in vain."""
        for failure in board.failures():
            if failure.rank == self._rank or failure.rank not in call.ranks or failure.call in self._own_failures:
                continue  # of a call that this rank has left as well
            if failure.call == call or board.place_of(failure.rank).is_lost(failure.turn, before=call):
                return f"rank {failure.rank} failed, and this one waited for it.\n{failure.traceback}"
        return self._gone(board, call)

    def _gone(self, board: _Board, call: Call) -> str | None:
        for other in call.ranks:
            if other != self._rank and board.is_gone(other) and not board.place_of(other).is_past(call):
                return f"rank {other} is gone: its process was ended"
        return None

    def _end(self) -> None:
        """Leave as the process does: a thread inside the store would crash it."""
        with contextlib.suppress(RuntimeError):  # the store is gone
            self._board.end(self._rank)
            if self._rank == 0:
                self._leave_last()
        self._ended.set()
        self._thread.join()

    def _leave_last(self) -> None:
        """Keep the store until the others have left their calls, or have ended.

        After a failure no longer than they need to see it; not at all where a launcher of our own ends them.
        """
        failed = self._call in self._own_failures
        if failed and is_launched():
            return
        deadline_s = time.monotonic() + (self._grace_s + 3 * self._poll_s if failed else _LAST_S)
        while time.monotonic() < deadline_s and any(map(self._needs_store, self._world)):
            time.sleep(_VISIBLE_S / 10)

    def _needs_store(self, other: int) -> bool:
        if other in self._call.ranks and self._board.place_of(other).is_past(self._call):
            return False  # it can make no further call without this rank
        return not self._board.has_ended(other)


@dataclass(frozen=True)
class _Place:
    """Where a rank is: how many calls it has entered with each group, and in whose it is now (None: in none)."""

    numbers: Counter[tuple[int, ...]] = field(default_factory=Counter)
    inside: tuple[int, ...] | None = None

    def is_lost(self, turn: int, before: Call) -> bool:
        """Whether it has entered no call since a turn, this one included."""
        return self.numbers.total() == turn and self.numbers[before.ranks] < before.number

    def is_past(self, call: Call) -> bool:
        """Whether it has left a call."""
        number = self.numbers[call.ranks]
        return number > call.number or (number == call.number and self.inside != call.ranks)


class _Board:
    """What ranks tell each other: where they run, in which call they are, and what they raised.

    One per thread: it has a connection of its own.
    """

    def __init__(self, store: Store) -> None:
        self._kept = store  # its server ends with it
        own = store.clone()  # type: ignore[attr-defined]
        own.set_timeout(_STORE_TIMEOUT)
        self._store = dist.PrefixStore("penstock/watch", own)  # type: ignore[attr-defined]
        self._homes: dict[int, tuple[str, int]] = {}
        self._failures: list[Failure] = []

    def move_in(self, rank: int) -> None:
        """Tell where this process runs."""
        self._store.set(f"home/{rank}", json.dumps([_home(), os.getpid()]))

    def end(self, rank: int) -> None:
        """Tell that a rank makes no further calls."""
        self._store.set(f"ended/{rank}", "true")

    def has_ended(self, rank: int) -> bool:
        """Whether a rank makes no further calls, or never moved in."""
        return self._home_of(rank) is None or self._read(f"ended/{rank}") is not None or self.is_gone(rank)

    def place(self, rank: int, place: _Place) -> None:
        """Tell where a rank is."""
        self._store.set(f"place/{rank}", json.dumps([list(place.numbers.items()), place.inside]))

    def place_of(self, rank: int) -> _Place:
        """Where a rank was when it last told."""
        numbers, inside = self._read(f"place/{rank}") or ([], None)
        counted = Counter({tuple(ranks): number for ranks, number in numbers})
        return _Place(counted, None if inside is None else tuple(inside))

    def publish(self, failure: Failure) -> int:
        """Tell all ranks of a failure; returns how many were published before."""
        ticket = self._store.add("tickets", 1)
        self._store.set(f"failure/{ticket}", json.dumps(asdict(failure)))
        return ticket - 1

    def failures(self) -> list[Failure]:
        """All that were published so far."""
        for ticket in range(len(self._failures) + 1, self._store.add("tickets", 0) + 1):
            told = self._read(f"failure/{ticket}")
            if told is None:  # about to be
                break
            call = Call(tuple(told["call"]["ranks"]), told["call"]["number"])
            self._failures.append(Failure(**{**told, "call": call}))
        return self._failures

    def is_gone(self, rank: int) -> bool:
        """Whether a rank's process has ended; False for one on another machine, which cannot be seen from here."""
        home = self._home_of(rank)
        return home is not None and home[0] == _home() and not _runs(home[1])

    def _home_of(self, rank: int) -> tuple[str, int] | None:
        if rank not in self._homes:
            told = self._read(f"home/{rank}")
            if told is None:
                return None
            self._homes[rank] = (told[0], told[1])
        return self._homes[rank]

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _is_exchange(error: BaseException) -> bool:
    """Whether an error, or its cause, is what torch raises when an exchange fails: no kind of its own with gloo."""
    return any(type(item) is RuntimeError or isinstance(item, dist.DistError) for item in (error, error.__cause__))


@functools.cache
def _home() -> str:
    """Where process ids mean the same: this host, and this container in it."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(space) if space.is_symlink() else ''}"


def _runs(process: int) -> bool:
    """Whether a process exists and is not only waiting to be reaped."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except PermissionError:
        return True
    except (ProcessLookupError, FileNotFoundError):
        return False

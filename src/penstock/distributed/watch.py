"""No rank waits for ever: who raises tells the others, and whoever still waits for it then ends.

A blocked collective cannot be interrupted, so a thread beside it asks the ranks' store once a second who failed, and
ends the process after a grace in which a rank may raise by itself. Owns who is to blame for a wait; does not know what
ranks compute, or how they tell each other (`board`).
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch.distributed as dist

from penstock.distributed.board import Board, Call, Failure, Place
from penstock.distributed.launcher import is_launched
from penstock.errors import GenerationError
from penstock.waits import current_wait, failed_ranks, noted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_POLL_S = 1.0
_GRACE_S = 5.0
_PATIENCE_S = 20.0
_VISIBLE_S = 0.5
_GATHER_POLL_S = 0.05
_NO_STORE = "rank 0 is gone, which kept the ranks together"
_LAST_S = 600.0  # how long rank 0 stays for others whose end it cannot see, on another machine
_EARLY = "as after an early stop on one rank only"
_watch: tuple[dist.ProcessGroup, Watch] | None = None


@dataclass(frozen=True)
class _Blame:
    """What another rank did, in words that a full stop may follow, and its traceback where it raised."""

    text: str
    traceback: str = ""

    @property
    def line(self) -> str:
        """Both in one line: of the traceback the last, the error itself."""
        return ": ".join([self.text, *self.traceback.strip().splitlines()[-1:]]).rstrip(".")


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

    A rank is left waiting by one that raised in the call, or whose process is gone before it left the call; and by one
    that left the call as if it were done, while others count on it (an early stop on one rank). As a rank may well
    leave early, and do other work, this is only said once nobody who is still inside can go on: each of them has waited
    in one exchange for `patience_s` (`waits.noted`), and this rank's is with one that has left. Ranks that compute,
    replicas with calls of their own, and those late for a call are not blamed. Exchanges on CUDA hold no thread: there
    the process group's own timeout ends who waits for a rank that left.

    Args:
        store: of the process group. Rank 0 keeps it, and waits at its exit until the others need it no longer.
        rank: of this process.
        world_size: number of ranks.
        poll_s: seconds between two looks at the store.
        grace_s: seconds in which a rank may leave a call by itself, once another has failed.
        patience_s: seconds after which an exchange is not only slow, where one of its ranks has left the call.

    Raises:
        GenerationError: on leaving, where an exchange failed because another rank did, is gone, or is in another call:
            names that rank.

    Cost: two small messages to the store per call, and one per `poll_s` inside.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        poll_s: float = _POLL_S,
        grace_s: float = _GRACE_S,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._rank = rank
        self._ranks = tuple(range(world_size))
        self._world = [other for other in self._ranks if other != rank]
        self._poll_s, self._grace_s, self._patience_s = poll_s, grace_s, patience_s
        self._board = Board(store)  # of the thread that calls; the one that looks has its own
        self._call = Call(self._ranks, 0)
        self._numbers: Counter[tuple[int, ...]] = Counter()
        self._depth = 0
        self._caller = 0  # thread that is inside
        self._num_gathered = 0  # in this call
        self._waited_for: tuple[int, ...] = ()  # by this rank, for longer than its patience
        self._blamed: _Blame | None = None  # for what this rank waits for in vain
        self._own_failures: set[Call] = set()
        self._inside = threading.Event()
        self._board.move_in(rank)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(Board(store),), name="penstock-watch", daemon=True)
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
                self._board.place(self._rank, Place(numbers, call.ranks))
            except RuntimeError as error:
                raise GenerationError(f"{_NO_STORE}. Start all ranks again.") from error
            self._call, self._numbers = call, numbers
            self._caller, self._num_gathered = threading.get_ident(), 0
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
                reason = self._reason(told, num_before, failed_ranks(error)) if _is_exchange(error) else None
            self._board.place(self._rank, Place(self._numbers))
        except RuntimeError:
            known = self._blamed.line if self._blamed is not None else _NO_STORE
            reason = known if error is not None and _is_exchange(error) else None
        if reason is not None:
            raise GenerationError(f"{reason}. Start all ranks again.") from error

    def gather(self, value: T, kind: type[T], patience_s: float = math.inf) -> list[T]:
        """The value of each rank of this call, in their order; waits for the slowest.

        For what ranks finish at very different times: no exchange, which has one. To be called inside, by all ranks.

        Args:
            value: numbers, texts, lists, mappings, and small: it goes through the store.
            kind: its type, which those of the others are held to.
            patience_s: seconds after which a rank that has not entered this call is missing.

        Raises:
            GenerationError: where another rank failed, is gone, or is missing: names it; for a value that no rank has
                written.

        Cost: 20 small messages per second of waiting.
        """
        call, number = self._call, self._num_gathered
        self._num_gathered += 1
        began_s = looked_s = time.monotonic()
        pause_s = _GATHER_POLL_S / 64
        try:
            if math.isfinite(patience_s):  # another may have lost it
                self._refuse_in_vain(call, number, kind, False)
            self._board.bring(self._rank, call, number, value)
            with noted(call.ranks):
                while (values := self._board.brought(call, number, kind)) is None:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _GATHER_POLL_S)
                    if time.monotonic() - looked_s < self._poll_s:
                        continue
                    looked_s = time.monotonic()
                    self._refuse_in_vain(call, number, kind, looked_s - began_s > patience_s)
        except RuntimeError as error:
            raise GenerationError(f"{_NO_STORE}. Start all ranks again.") from error
        return values

    def _refuse_in_vain(self, call: Call, number: int, kind: type[Any], is_late: bool) -> None:
        """Raise where a value of this call never comes: its rank failed, is gone, or, once it is late, is elsewhere."""
        blame = self._blame(self._board, call)
        missing = [rank for rank in call.ranks if is_late and self._board.place_of(rank).is_before(call)]
        if self._board.brought(call, number, kind) is not None:
            return
        if blame is not None:
            raise GenerationError(f"{blame.line}. Start all ranks again.")
        if missing:
            who = " and ".join(f"rank {rank}" for rank in missing)
            raise GenerationError(
                f"{who} did not make the call that rank {self._rank} waits in. Ranks that share a model call it "
                "together, with the same arguments: make the call on every rank, or on a pipeline that is not split."
            )

    def _reason(self, own: Failure, num_before: int, ranks: tuple[int, ...]) -> str | None:
        """Which other rank made an exchange of some ranks fail; None where this rank is to blame itself."""
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
                return gone.text
            time.sleep(_VISIBLE_S / 10)
        return self._elsewhere(own.call, ranks)

    def _elsewhere(self, call: Call, ranks: tuple[int, ...]) -> str | None:
        """Which of the ranks of a failed exchange is not in its call."""
        failed = {failure.rank for failure in self._board.failures() if failure.call == call}
        for other in ranks:
            if other == self._rank or other in failed:
                continue
            place = self._board.place_of(other)
            if place.is_past(call):
                return _left(other)
            if place.is_before(call):
                what = "is still in an earlier call" if place.inside == call.ranks else "has not begun this call"
                return f"rank {other} {what}, in which this rank waited for it, {_EARLY}"
        return None

    def _look(self, board: Board) -> None:
        """While inside a call, look for who keeps this rank waiting; end the process once the grace is over."""
        patience, grace = _Patience(self._patience_s), _Patience(self._grace_s)
        while not self._ended.wait(self._poll_s):
            call = self._call
            try:
                self._tell_if_stuck(board, call, patience)
                blame = self._blame(board, call) if self._inside.is_set() else None
            except RuntimeError:
                blame = _Blame(_NO_STORE) if self._inside.is_set() else None
            except GenerationError as error:  # somebody else writes into the store
                blame = _Blame(str(error).rstrip(".")) if self._inside.is_set() else None
            if blame is None or (self._call, self._inside.is_set()) != (call, True):
                self._blamed = blame = None
            elif self._blamed is None:
                self._blamed = blame
            if grace.is_over(None if blame is None else call) and self._blamed is not None:
                self._exit(board, call, self._blamed)

    def _exit(self, board: Board, call: Call, blame: _Blame) -> None:
        """End the process, and let the others know why."""
        text = f"rank {self._rank} ends: {blame.text}"
        with contextlib.suppress(RuntimeError):  # the store is gone
            board.publish(Failure(self._rank, call, self._numbers.total(), f"GenerationError: {blame.line}"))
        print("\n".join(filter(None, (text, blame.traceback))), file=sys.stderr, flush=True)
        time.sleep(1.5 * self._poll_s if self._rank == 0 else 0)  # it keeps the store
        os._exit(1)

    def _tell_if_stuck(self, board: Board, call: Call, patience: _Patience) -> None:
        """Note for which ranks this one has waited too long in a call; let the others know when that begins or ends."""
        wait = current_wait(self._caller) if self._inside.is_set() else None
        ranks = wait.ranks if wait is not None and patience.is_over((call, wait.number)) else ()
        if bool(ranks) != bool(self._waited_for):
            board.stick(self._rank, call if ranks else None)
        self._waited_for = ranks

    def _blame(self, board: Board, call: Call) -> _Blame | None:
        """Who failed, is gone, or has left, so that this rank waits for it in vain."""
        for failure in board.failures():
            if failure.rank == self._rank or failure.rank not in call.ranks or failure.call in self._own_failures:
                continue  # of a call that this rank has left as well
            if failure.call == call or board.place_of(failure.rank).is_lost(failure.turn, before=call):
                return _Blame(f"rank {failure.rank} failed, and this one waited for it", failure.traceback)
        return self._gone(board, call) or self._early(board, call)

    def _gone(self, board: Board, call: Call) -> _Blame | None:
        for other in call.ranks:
            if other != self._rank and board.is_gone(other) and not board.place_of(other).is_past(call):
                return _Blame(f"rank {other} is gone: its process was ended")
        return None

    def _early(self, board: Board, call: Call) -> _Blame | None:
        """Who left the call that this rank is stuck in; None while anybody inside may go on."""
        if not self._waited_for:
            return None
        others = [other for other in call.ranks if other != self._rank]
        left = [other for other in others if board.place_of(other).is_past(call)]
        first = next((other for other in left if other in self._waited_for), None)
        if first is None or not all(other in left or board.is_stuck(other, call) for other in others):
            return None
        return _Blame(_left(first))

    def _end(self) -> None:
        """Leave as the process does: a thread inside the store would crash it."""
        with contextlib.suppress(RuntimeError, GenerationError):  # the store is gone, or others write into it
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


class _Patience:
    """How long the same has been seen."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._seen: Any = None
        self._since_s = 0.0

    def is_over(self, seen: Any) -> bool:
        """Whether it has been seen each time, for too long."""
        if seen != self._seen:
            self._seen, self._since_s = seen, time.monotonic()
        return time.monotonic() - self._since_s >= self._patience_s


def _left(rank: int) -> str:
    return f"rank {rank} left the call, which this rank is still in and waits for it, {_EARLY}"


def _is_exchange(error: BaseException) -> bool:
    """Whether an error, or its cause, is what torch raises when an exchange fails: no kind of its own with gloo."""
    return any(type(item) is RuntimeError or isinstance(item, dist.DistError) for item in (error, error.__cause__))

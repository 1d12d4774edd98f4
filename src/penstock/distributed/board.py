"""What ranks tell each other through their store: where they run, in which call they are, what they raised.

Owns the keys and their forms; values are signed (`signing`). Does not know who waits for whom, or what follows from it.
"""

from __future__ import annotations

import functools
import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from penstock.distributed.signing import Signer, run_secret

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_STORE_TIMEOUT = timedelta(seconds=3)


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


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        numbers: how many calls it has entered with each group of ranks.
        inside: in whose it is now; None in none.
    """

    numbers: Counter[tuple[int, ...]] = field(default_factory=Counter)
    inside: tuple[int, ...] | None = None

    def is_lost(self, turn: int, before: Call) -> bool:
        """Whether it has entered no call since a turn, this one included."""
        return self.numbers.total() == turn and self.numbers[before.ranks] < before.number

    def is_before(self, call: Call) -> bool:
        """Whether it has not entered a call yet."""
        return self.numbers[call.ranks] < call.number

    def is_past(self, call: Call) -> bool:
        """Whether it has left a call."""
        number = self.numbers[call.ranks]
        return number > call.number or (number == call.number and self.inside != call.ranks)


@dataclass(frozen=True)
class _Placed:
    """A place as it is written: mappings have no groups of ranks as keys there."""

    numbers: list[tuple[tuple[int, ...], int]]
    inside: tuple[int, ...] | None


class Board:
    """Where ranks write, and read what others wrote. One per thread: it has a connection of its own.

    Args:
        store: of the process group.

    Raises:
        RuntimeError: (from all methods) where the store is gone; torch has no kind of its own for it.
        GenerationError: (from those that read) for a value that no rank of this run has written.

    Cost: one or two small messages to the store for each method, `failures` one for each new one besides.
    """

    def __init__(self, store: Store) -> None:
        self._kept = store  # its server ends with it
        own = store.clone()  # type: ignore[attr-defined]
        own.set_timeout(_STORE_TIMEOUT)
        self._store = dist.PrefixStore("penstock/watch", own)  # type: ignore[attr-defined]
        self._signer = Signer(run_secret())
        self._homes: dict[int, tuple[str, int]] = {}
        self._failures: list[Failure] = []

    def move_in(self, rank: int) -> None:
        """Tell where this process runs."""
        self._write(f"home/{rank}", (_home(), os.getpid()))

    def end(self, rank: int) -> None:
        """Tell that a rank makes no further calls."""
        self._write(f"ended/{rank}", True)

    def has_ended(self, rank: int) -> bool:
        """Whether a rank makes no further calls, or never moved in."""
        return self._home_of(rank) is None or self._read(f"ended/{rank}", bool) is not None or self.is_gone(rank)

    def place(self, rank: int, place: Place) -> None:
        """Tell where a rank is."""
        self._write(f"place/{rank}", _Placed(list(place.numbers.items()), place.inside))

    def place_of(self, rank: int) -> Place:
        """Where a rank was when it last told."""
        told = self._read(f"place/{rank}", _Placed)
        return Place() if told is None else Place(Counter(dict(told.numbers)), told.inside)

    def stick(self, rank: int, call: Call | None) -> None:
        """Tell that a rank is stuck in a call: it waits for others, and has for long. None: it is not."""
        self._write(f"stuck/{rank}", call)

    def is_stuck(self, rank: int, call: Call) -> bool:
        """Whether a rank is stuck in a call, as it last told."""
        return self._read(f"stuck/{rank}", Call | None) == call  # type: ignore[arg-type]  # which is a type for msgspec

    def bring(self, rank: int, call: Call, number: int, value: Any) -> None:
        """Leave what all ranks of a call shall have: numbers, texts, lists, mappings.

        Args:
            rank: whose it is.
            call: in which.
            number: which of the values of that call.
            value: is copied.
        """
        self._write(_key(rank, call, number), value)

    def brought(self, call: Call, number: int, kind: type[T]) -> list[T] | None:
        """What the ranks of a call have brought, in their order; None as long as one is lacking.

        Args:
            call: in which.
            number: which of the values of that call.
            kind: of which type each is.
        """
        keys = [_key(rank, call, number) for rank in call.ranks]
        if not self._store.check(keys):
            return None
        return [self._signer.read(key, self._store.get(key), kind) for key in keys]

    def publish(self, failure: Failure) -> int:
        """Tell all ranks of a failure; returns how many were published before."""
        ticket = self._store.add("tickets", 1)
        self._write(f"failure/{ticket}", failure)
        return ticket - 1

    def failures(self) -> list[Failure]:
        """All that were published so far."""
        for ticket in range(len(self._failures) + 1, self._store.add("tickets", 0) + 1):
            told = self._read(f"failure/{ticket}", Failure)
            if told is None:  # about to be
                break
            self._failures.append(told)
        return self._failures

    def is_gone(self, rank: int) -> bool:
        """Whether a rank's process has ended; False for one on another machine, which cannot be seen from here."""
        home = self._home_of(rank)
        return home is not None and home[0] == _home() and not _runs(home[1])

    def _home_of(self, rank: int) -> tuple[str, int] | None:
        if rank not in self._homes:
            told = self._read(f"home/{rank}", tuple[str, int])
            if told is None:
                return None
            self._homes[rank] = told
        return self._homes[rank]

    def _write(self, key: str, value: Any) -> None:
        self._store.set(key, self._signer.write(key, value))  # type: ignore[arg-type]  # bytes will do

    def _read(self, key: str, kind: type[T]) -> T | None:
        return self._signer.read(key, self._store.get(key), kind) if self._store.check([key]) else None


def _key(rank: int, call: Call, number: int) -> str:
    return f"value/{'.'.join(map(str, call.ranks))}/{call.number}/{number}/{rank}"


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

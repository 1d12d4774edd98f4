"""For what each thread of this process waits that other ranks have to bring: noted where it begins, gone where it ends.

Owns the notes. Does not know what is waited for, or who reads them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_numbers = itertools.count(1)
_notes: dict[int, Wait] = {}


@dataclass(frozen=True)
class Wait:
    """A wait that is under way.

    Attributes:
        number: its own.
        ranks: among which are those that it is for; none for what another thread of this process waits for.
    """

    number: int
    ranks: tuple[int, ...]


@contextmanager
def noted(ranks: tuple[int, ...] = ()) -> Iterator[None]:
    """A context around what may block until other ranks have done their part.

    What is raised inside keeps the ranks (`failed_ranks`).

    Args:
        ranks: global, this one may be among them; left out where another thread waits for them.

    Cost: about a microsecond.
    """
    thread = threading.get_ident()
    before = _notes.get(thread)
    _notes[thread] = Wait(next(_numbers), ranks)
    try:
        yield
    except RuntimeError as error:
        error.__dict__.setdefault("_penstock_ranks", ranks)
        raise
    finally:
        if before is None:
            del _notes[thread]
        else:
            _notes[thread] = before


def current_wait(thread: int) -> Wait | None:
    """What a thread waits for now, with the ranks that any thread of this process waits for; None where it does not.

    Args:
        thread: its `threading.get_ident()`.
    """
    wait = _notes.get(thread)
    if wait is None:
        return None
    return Wait(wait.number, tuple(sorted({rank for note in list(_notes.values()) for rank in note.ranks})))


def failed_ranks(error: BaseException) -> tuple[int, ...]:
    """The ranks of the wait in which an error was raised, or its cause was; none where it was raised elsewhere."""
    for item in (error, error.__cause__):
        ranks: tuple[int, ...] = getattr(item, "_penstock_ranks", ())
        if ranks:
            return ranks
    return ()

"""One object stands in for an attribute of another, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stand_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of this very object inside; afterwards it is as before, or the class's own again."""
    had_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

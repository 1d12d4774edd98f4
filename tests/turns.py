"""What is too much for every run of the tests: it takes turns, and all of it runs where PENSTOCK_THOROUGH is set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

IS_THOROUGH = bool(os.environ.get("PENSTOCK_THOROUGH"))


def by_turns(items: Iterable[T], of: int, first: int = 0) -> list[T]:
    """Every so many of some items, beginning with one; all of them in a thorough run."""
    return [item for number, item in enumerate(items) if IS_THOROUGH or number % of == first % of]

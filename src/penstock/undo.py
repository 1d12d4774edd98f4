"""What was done and has to be undone, the last first; interrupted, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self


class Undo:
    """Steps that take something back. Each may be called twice: Ctrl-C may come within one.

    with Undo() as undo:      # what raises in here takes back what was done so far
        undo.add(module.put_back)
        module.change()
    return undo
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.run()

    def add(self, step: Callable[[], None]) -> None:
        """Remember a step."""
        self._steps.append(step)

    def run(self) -> None:
        """Take all of it back; a step is forgotten once it is over."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

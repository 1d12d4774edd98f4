"""What was done and has to be undone, the last first; interrupted, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import TracebackType
from typing import Any, Self


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

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Have a method of one object called through `around`, which is given the method and then its arguments.

        An attribute that the object itself has under this name comes back.
        """
        own, stock = vars(owner), getattr(owner, name)
        hidden = {name: own[name]} if name in own else {}

        def unwrap() -> None:
            own.pop(name, None)
            own.update(hidden)

        self.add(unwrap)
        own[name] = wraps(stock)(partial(around, stock))

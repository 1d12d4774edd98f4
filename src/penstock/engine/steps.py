"""Step events from any pipeline, by standing in for its progress bar.

Nearly every stock pipeline draws `self.progress_bar(...)`, many have no step callback: the bar is the one thing
they share. Owns that stand-in and takes it away again; does not know requests or terminals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from penstock.engine.standin import stand_in
from penstock.request import StepEvent

OnStep = Callable[[StepEvent], None]


class Watch:
    """Whether a failure came from the callback or from the pipeline."""

    in_callback = False


@contextmanager
def step_events(pipeline: Any, item: int, on_step: OnStep | None) -> Iterator[Watch]:
    """Call `on_step` after every step inside; the pipeline's own bar is not drawn meanwhile.

    Yields:
        A watch that says, after a failure, whether the callback raised it.
    """
    begun_s = time.perf_counter()
    watch = Watch()
    stages = 0

    def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> StepBar:
        nonlocal stages
        stages += 1
        stage = stages - 1

        def report(step: int, of: int) -> None:
            if on_step is not None:
                elapsed_s = time.perf_counter() - begun_s
                watch.in_callback = True
                on_step(StepEvent(item=item, stage=stage, step=step, total=of, elapsed_s=elapsed_s))
                watch.in_callback = False

        return StepBar(iterable, total, report)

    with stand_in(pipeline, "progress_bar", progress_bar):
        yield watch


class StepBar:
    """Has what diffusers uses of a tqdm bar, and reports steps instead of drawing.

    Args:
        iterable: what is looped over, or None where the pipeline calls `update` itself.
        total: number of steps; None takes the iterable's length, or 0 where it has none.
        report: called with (steps done, steps in all): once with 0 at the start, then after each step.
    """

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, report: Callable[[int, int], None]) -> None:
        self.iterable = iterable
        self.total = total if total is not None else len(iterable) if isinstance(iterable, Sized) else 0
        self.n = 0
        self._report = report
        report(0, self.total)

    def update(self, n: int = 1) -> None:
        """Count `n` steps as done."""
        self.n += n
        self._report(self.n, self.total)

    def __iter__(self) -> Iterator[Any]:
        for value in self.iterable or ():
            yield value
            self.update()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to clean up."""

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Descriptions are not reported."""

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Postfixes are not reported."""

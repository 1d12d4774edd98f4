"""Progress on a terminal: one bar for loading, one for denoising; silent where nobody watches.

Owns what is drawn on standard error. Standard output stays free for results.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from penstock.request import StepEvent

if TYPE_CHECKING:
    from penstock.engine.build import LoadEvent

_MIB = 2**20


class Bars:
    """Bars that appear with the first event; `loading` and `step` are the callbacks that draw them."""

    def __init__(self, num_items: int = 1, *, is_silent: bool = False) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=is_silent or not console.is_terminal,
        )
        self._num_items = num_items
        self._load: TaskID | None = None
        self._begun_s = time.monotonic()
        self._stage: tuple[int, int] | None = None
        self._steps: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def print(self, line: str) -> None:
        """Print a line of results on standard output; the bars stay below it."""
        self._progress.stop()
        typer.echo(line)
        self._progress.start()

    def loading(self, event: LoadEvent) -> None:
        """Draw how much of the model is loaded."""
        rate = event.done_bytes / _MIB / max(time.monotonic() - self._begun_s, 1e-3)
        state = f"{event.done_bytes / _MIB:,.1f} of {event.total_bytes / _MIB:,.1f} MiB, {rate:,.0f} MiB/s "
        state += event.component
        if self._load is None:
            self._load = self._progress.add_task("loading", total=event.total_bytes, state=state)
        self._progress.update(self._load, completed=event.done_bytes, total=event.total_bytes, state=state)
        if not event.component:
            self._progress.refresh()
            self._progress.remove_task(self._load)

    def step(self, event: StepEvent) -> None:
        """Draw how far the denoising of the current picture is."""
        if self._stage != (event.item, event.stage):
            self._stage = (event.item, event.stage)
            if self._steps is not None:
                self._progress.remove_task(self._steps)
            which = f" {event.item + 1} of {self._num_items}" if self._num_items > 1 else ""
            self._steps = self._progress.add_task(f"denoising{which}", total=event.total or None, state="")
        if self._steps is not None:
            seconds = f", {event.elapsed_s / event.step:.2f} s per step" if event.step else ""
            of = f" of {event.total}" if event.total else ""
            self._progress.update(self._steps, completed=event.step, state=f"step {event.step}{of}{seconds}")

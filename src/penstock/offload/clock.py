"""Whether the denoising loop is at its last call, read from the pipeline's own scheduler.

Nothing is hooked: a scheduler counts its steps itself. One that does not is taken to go on; the cost is one fill
for nothing at the end of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class StepClock:
    """Counts the calls that a denoiser gets per step (two, where guidance calls twice).

    Args:
        pipeline: whose attributes (or whose inner pipelines' attributes) hold the scheduler; looked for at every call,
            because pipelines exchange it.

    Attributes:
        is_first: whether the call that began last is one of the first step.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.restart()

    def restart(self) -> None:
        """Count anew, as if nothing had run."""
        self._step: int | None = None
        self._num_steps = 0
        self.is_first = True
        self._calls = 0
        self._calls_per_step = 1

    def tick(self) -> None:
        """A call of the denoiser begins, or is put off."""
        step, self._num_steps, self.is_first = self._now()
        if step != self._step:
            if self._step is not None and step > self._step:
                self._calls_per_step = max(self._calls, 1)
            self._step, self._calls = step, 0
        self._calls += 1

    def is_last(self) -> bool:
        """Whether the call that began last is the last one of the run."""
        is_last_step = self._step is not None and 0 < self._num_steps <= self._step + 1
        return is_last_step and self._calls >= self._calls_per_step

    def _now(self) -> tuple[int, int, bool]:
        """The step that runs, from 0, how many there are, and if it is the first; 0 of 0 where no scheduler says."""
        for scheduler in _schedulers(self._pipeline):
            begin = getattr(scheduler, "begin_index", None) or 0  # a picture as input: later than the first step
            step = begin if scheduler.step_index is None else scheduler.step_index
            return step, len(scheduler.timesteps), step == begin
        return 0, 0, True


def _schedulers(pipeline: Any) -> Iterator[Any]:
    """What has timesteps and counts its steps; in inner pipelines where the outer one has none."""
    parts = list(vars(pipeline).values())
    yield from (part for part in parts if hasattr(part, "step_index") and getattr(part, "timesteps", None) is not None)
    for part in parts:
        if isinstance(getattr(part, "components", None), dict):
            yield from _schedulers(part)

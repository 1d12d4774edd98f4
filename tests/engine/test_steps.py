"""Step events: every stock way of drawing a bar reports, and the pipeline is as before afterwards."""

from __future__ import annotations

import pytest

from penstock.engine.steps import step_events
from penstock.request import StepEvent
from tests import zoo


class Looped:
    """Draws one bar over an iterable and one that it updates itself."""

    def progress_bar(self, iterable: object = None, total: int | None = None) -> None:
        raise AssertionError("the stand-in is used")

    def run(self) -> None:
        for _ in self.progress_bar(range(2)):
            pass
        with self.progress_bar(total=3) as bar:
            bar.set_description("half")
            bar.update()
            bar.update(2)


def test_both_ways_of_drawing() -> None:
    events: list[StepEvent] = []
    pipeline = Looped()
    with step_events(pipeline, 5, events.append):
        pipeline.run()
    assert [(event.stage, event.step, event.total) for event in events] == [
        (0, 0, 2),
        (0, 1, 2),
        (0, 2, 2),
        (1, 0, 3),
        (1, 1, 3),
        (1, 3, 3),
    ]
    assert {event.item for event in events} == {5}
    assert [event.elapsed_s for event in events] == sorted(event.elapsed_s for event in events)


def test_stand_in_is_taken_away_after_a_failure() -> None:
    pipeline = Looped()
    with pytest.raises(KeyError), step_events(pipeline, 0, None):
        raise KeyError
    assert "progress_bar" not in vars(pipeline)


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "stranger"])
def test_every_stock_pipeline_reports_its_steps(name: str) -> None:
    events: list[StepEvent] = []
    pipeline = zoo.build(name)
    with step_events(pipeline, 0, events.append):
        zoo.run(pipeline, name)
    assert events[0].step == 0
    assert events[-1].step == events[-1].total > 0


def test_pipeline_without_a_bar_runs_without_events() -> None:
    events: list[StepEvent] = []
    pipeline = zoo.build("stranger")
    with step_events(pipeline, 0, events.append):
        zoo.run(pipeline, "stranger")
    assert events == []

"""What the engine tells becomes progress, and news for whoever listens."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from penstock.request import GenerationRequest, StepEvent
from penstock.server.runs import Feed, Run
from penstock.wire import Began, Ended, Order, Partial, Stage, Step
from tests.server.jobs import a_job


def run_of(num_images: int = 1, **options: Any) -> Run:
    job = a_job()
    request = GenerationRequest(prompt="x", seed=0, num_images=num_images)
    return Run(job, Order(id=job.id, request=request, folder="/nowhere"), **options)


def step(item: int, done: int, total: int, stage: int = 0) -> Step:
    return Step(id="x", event=StepEvent(item=item, stage=stage, step=done, total=total, elapsed_s=0.1))


def advance(run: Run, *steps: Step) -> list[int]:
    """The progress after each step, as a follower keeps it."""
    seen = []
    for one in steps:
        progress = run.advance(one)
        if progress is not None:
            run.job = replace(run.job, progress=progress)
        seen.append(run.job.progress)
    return seen


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_progress_is_the_real_step_and_never_all(num_images: int) -> None:
    async def main() -> list[int]:
        steps = [step(item, done, 4) for item in range(num_images) for done in range(1, 5)]
        return advance(run_of(num_images), *steps)

    seen = asyncio.run(main())
    total = 4 * num_images
    assert seen == [min(int(100 * done / total), 99) for done in range(1, total + 1)]


def test_progress_never_goes_back() -> None:
    async def main() -> list[int]:
        run = run_of()
        steps = [step(0, done, 4) for done in range(1, 5)] + [step(0, done, 2, stage=1) for done in (1, 2)]
        return advance(run, *steps)

    seen = asyncio.run(main())
    assert seen == sorted(seen) and seen[-1] == 99


def test_a_second_stage_that_was_seen_before_is_reckoned_with() -> None:
    async def main() -> list[int]:
        run = run_of(num_stages=2)
        return advance(run, step(0, 2, 4), step(0, 4, 4), step(0, 1, 2, stage=1), step(0, 2, 2, stage=1))

    assert asyncio.run(main()) == [25, 50, 75, 99]


def test_steps_without_a_total_do_not_invent_progress() -> None:
    async def main() -> list[int]:
        return advance(run_of(), step(0, 1, 0), step(0, 900, 0))

    assert asyncio.run(main()) == [0, 0]


def test_late_listeners_hear_what_was_and_where_it_stands() -> None:
    async def main() -> list[dict[str, Any]]:
        run = run_of()
        run.advance(Began(id="x", group=0))
        run.advance(Stage(id="x", item=0, name="denoise"))
        run.advance(step(0, 1, 4))
        run.advance(Partial(id="x", item=0, index=0, path="p.png"))
        run.advance(step(0, 2, 4))
        with run.listening() as feed:
            run.tell({"type": "kept", "item": 0})
            run.is_over.set()
            run.tell({"type": "ended"})
            return [news async for news in feed]

    news = asyncio.run(main())
    assert [one["type"] for one in news] == ["progress", "partial_image", "kept", "ended"]
    assert (news[0]["stage"], news[0]["step"], news[0]["total"]) == ("denoise", 2, 4)


def test_listeners_of_what_is_over_end_at_once() -> None:
    async def main() -> list[str]:
        run = run_of()
        run.is_over.set()
        with run.listening() as feed:
            return [news["type"] async for news in feed]

    assert asyncio.run(main()) == ["progress", "ended"]


def test_a_slow_listener_loses_old_steps_and_nothing_else() -> None:
    async def main() -> list[dict[str, Any]]:
        feed = Feed()
        feed.put({"type": "kept", "item": 0})
        for number in range(10_000):
            feed.put({"type": "progress", "step": number})
        feed.put({"type": "ended"})
        return [news async for news in feed]

    news = asyncio.run(main())
    assert len(news) <= 258 and news[0]["type"] == "kept"
    assert news[-2]["step"] == 9999 and news[-1]["type"] == "ended"


def test_events_cross_from_the_engines_thread_in_order() -> None:
    async def main() -> list[int]:
        run = run_of()

        def engine() -> None:
            for number in range(1, 501):
                run.hear(step(0, number, 500))
            run.hear(Ended(id="x"))

        threading.Thread(target=engine).start()
        seen = []
        while isinstance(event := await run.heard.get(), Step):
            seen.append(event.event.step)
        return seen

    assert asyncio.run(main()) == list(range(1, 501))


def test_what_is_heard_after_the_loop_is_lost_quietly() -> None:
    async def main() -> Run:
        return run_of()

    asyncio.run(main()).hear(Ended(id="x"))

"""The last call of a run is known from the scheduler alone, whichever it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from penstock.offload.clock import StepClock


def scheduler_of(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def run(clock: StepClock, scheduler: Any, num_steps: int, calls: int = 1, begin: int | None = None) -> list[bool]:
    """Whether each call of the denoiser is taken for the last, in a loop as pipelines have it."""
    scheduler.set_timesteps(num_steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    answers = []
    x = torch.zeros(1, 4, 2, 2)
    for t in scheduler.timesteps[begin or 0 :]:
        for _ in range(calls):
            clock.tick()
            answers.append(clock.is_last())
        x = scheduler.step(torch.ones_like(x), t, x, return_dict=False)[0]
    return answers


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
COUNTING = [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
]


@pytest.mark.filterwarnings("ignore:.*scale_model_input")
@pytest.mark.parametrize(("name", "options"), COUNTING, ids=[name for name, _ in COUNTING])
def test_the_last_call_of_every_run_is_known(name: str, options: dict[str, Any]) -> None:
    scheduler = scheduler_of(name, **options)
    clock = StepClock(SimpleNamespace(vae=None, scheduler=scheduler))
    for num_steps in (4, 1, 3):
        answers = run(clock, scheduler, num_steps)
        assert answers == [False] * (len(answers) - 1) + [True], num_steps


def test_guidance_that_calls_twice_is_learnt_in_the_first_step() -> None:
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    clock = StepClock(SimpleNamespace(scheduler=scheduler))
    assert run(clock, scheduler, 3, calls=2) == [False] * 5 + [True]
    assert run(clock, scheduler, 2, calls=2) == [False] * 3 + [True]
    assert run(clock, scheduler, 3, calls=1)[:-1] == [False] * 2  # guidance is off now


@pytest.mark.parametrize("begin", [0, 2, 3])
def test_a_run_from_a_picture_begins_later_and_ends_the_same(begin: int) -> None:
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    answers = run(StepClock(SimpleNamespace(scheduler=scheduler)), scheduler, 4, begin=begin)
    assert answers == [False] * (3 - begin) + [True]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_a_scheduler_that_does_not_count_is_taken_to_go_on(name: str) -> None:
    scheduler = scheduler_of(name)
    assert not any(run(StepClock(SimpleNamespace(scheduler=scheduler)), scheduler, 4))


@pytest.mark.parametrize(
    "pipeline",
    [
        SimpleNamespace(),
        SimpleNamespace(scheduler=None),
        SimpleNamespace(scheduler=SimpleNamespace(step_index=3, timesteps=None)),
        SimpleNamespace(scheduler=SimpleNamespace(timesteps=[1, 2])),
    ],
)
def test_without_a_scheduler_it_goes_on(pipeline: Any) -> None:
    clock = StepClock(pipeline)
    clock.tick()
    assert not clock.is_last()


def test_the_scheduler_may_be_exchanged_and_may_lie_in_an_inner_pipeline() -> None:
    inner = SimpleNamespace(components={}, scheduler=scheduler_of("FlowMatchEulerDiscreteScheduler"))
    clock = StepClock(SimpleNamespace(pipe=inner))
    assert run(clock, inner.scheduler, 2) == [False, True]
    inner.scheduler = scheduler_of("UniPCMultistepScheduler", **FLOW)
    assert run(clock, inner.scheduler, 3) == [False, False, True]


def test_a_call_belongs_to_the_step_in_which_it_was_announced() -> None:
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    clock = StepClock(SimpleNamespace(scheduler=scheduler))
    scheduler.set_timesteps(3)
    answers = []
    x = torch.zeros(1, 4, 2, 2)
    for t in scheduler.timesteps:
        for _ in range(2):
            clock.tick()
        x = scheduler.step(torch.ones_like(x), t, x, return_dict=False)[0]
        answers.append(clock.is_last())  # made when the scheduler is a step further
    assert answers == [False, False, True]

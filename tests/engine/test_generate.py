"""Generation: seeds, several pictures, steps, failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock import GenerationError, GenerationRequest, RequestError, StepEvent
from penstock.request import GenerationResult
from tests import zoo

SMALL = {"width": 56, "height": 40, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def flux() -> Any:
    return zoo.build("flux")


def pixels(result: GenerationResult) -> np.ndarray[Any, Any]:
    return np.asarray(result.images[0])


def first_of(value: Any) -> Any:
    """One prompt of a batch."""
    return value[0] if isinstance(value, list) else value


def make(pipeline: Any, **fields: Any) -> list[GenerationResult]:
    return list(penstock.generate(pipeline, GenerationRequest(prompt="red", **SMALL, **fields)))


def test_picture_equals_the_stock_call(flux: Any) -> None:
    (result,) = make(flux, seed=7)
    stock = flux("red", **SMALL, generator=torch.Generator().manual_seed(7)).images[0]
    assert np.array_equal(pixels(result), np.asarray(stock))
    assert result.kind == "image" and result.seed == 7


def test_each_of_several_pictures_is_that_of_its_own_seed(flux: Any) -> None:
    several = make(flux, seed=3, num_images=3)
    assert [result.seed for result in several] == [3, 4, 5]
    for result in several:
        (alone,) = make(flux, seed=result.seed)
        assert np.array_equal(pixels(result), pixels(alone))
    assert not np.array_equal(pixels(several[0]), pixels(several[1]))


def test_drawn_seed_makes_the_picture_again(flux: Any) -> None:
    (drawn,) = make(flux)
    (again,) = make(flux, seed=drawn.seed)
    assert np.array_equal(pixels(drawn), pixels(again))
    assert make(flux)[0].seed != drawn.seed


def test_steps_are_counted_per_picture(flux: Any) -> None:
    events: list[StepEvent] = []
    list(penstock.generate(flux, GenerationRequest(prompt="red", num_images=2, **SMALL), on_step=events.append))
    assert [(event.item, event.step) for event in events] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_results_come_one_by_one(flux: Any) -> None:
    events: list[StepEvent] = []
    request = GenerationRequest(prompt="red", num_images=2, **SMALL)
    first = next(penstock.generate(flux, request, on_step=events.append))
    assert first.elapsed_s > 0
    assert {event.item for event in events} == {0}


def test_impossible_requests_are_refused_at_once(flux: Any) -> None:
    with pytest.raises(RequestError, match="not a multiple"):
        penstock.generate(flux, GenerationRequest(prompt="red", width=3))


def test_failure_inside_the_pipeline_is_typed_and_leaves_it_usable(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the weights are on fire\nand a long trace")

    with monkeypatch.context() as patch:
        patch.setattr(flux.transformer, "forward", fail)
        with pytest.raises(
            GenerationError, match="FluxPipeline failed while it ran: RuntimeError: the weights are on fire$"
        ):
            make(flux)
    assert "progress_bar" not in vars(flux)
    assert make(flux, seed=1)


def test_failure_of_the_callback_is_its_own(flux: Any) -> None:
    class CancelledError(Exception):
        pass

    def stop(event: StepEvent) -> None:
        if event.step == 1:
            raise CancelledError

    with pytest.raises(CancelledError):
        list(penstock.generate(flux, GenerationRequest(prompt="red", **SMALL), on_step=stop))
    assert make(flux, seed=1)


def test_makers_defaults_count_for_a_loaded_pipeline(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo_folder("flux"), tmp_path / "flux"))
    (folder / "penstock.json").write_text(json.dumps({"defaults": SMALL}))
    (result,) = penstock.generate(penstock.load(folder), GenerationRequest(prompt="red", height=48))
    assert result.images[0].size == (56, 48)
    assert result.arguments["num_inference_steps"] == 2


def test_frame_rate_of_a_video_is_what_was_asked() -> None:
    call = {"width": 80, "height": 48, "num_inference_steps": 1, "num_frames": 5}
    request = GenerationRequest(prompt="red", frame_rate=5.0, **call)
    (result,) = penstock.generate(zoo.build("wan21"), request)
    assert result.frame_rate == 5


def test_out_of_memory_says_what_to_do(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(flux.transformer, "forward", fail)
    with pytest.raises(GenerationError, match="ran out of device memory. Ask for a smaller size"):
        make(flux)


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "stranger"])
def test_every_kind_of_pipeline(name: str) -> None:
    call = {key: value for key, value in zoo.ENTRIES[name].call.items() if "per_prompt" not in key}
    call.pop("output_type", None)
    prompt = call.pop("prompt")
    negative = call.pop("negative_prompt", None)
    request = GenerationRequest(prompt=first_of(prompt), negative_prompt=first_of(negative), seed=0, arguments=call)
    (result,) = penstock.generate(zoo.build(name), request)
    made = zoo.ENTRIES[name].output
    assert result.kind == made.removesuffix("+audio")
    assert (result.audio is not None) == ("audio" in made)
    assert (result.frame_rate is not None) == ("video" in made)
    assert bool(result.images) == (made != "audio")
    for image in result.images:
        assert np.asarray(image).std() > 0

"""Pictures of unfinished latents come nearer to the last one, and change nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock.engine.generate import call
from penstock.engine.previews import Previews, can_preview, preview_steps
from penstock.engine.steps import step_events
from tests import zoo

IMAGES = ("flux", "flux2", "flux2_klein", "qwen_image", "z_image", "sd3", "sana", "chroma", "lumina2", "sdxl", "sd15")


@pytest.mark.parametrize(
    ("num_partials", "num_steps", "wanted"),
    [(0, 8, ()), (1, 8, (4,)), (3, 8, (2, 4, 6)), (3, 2, (1,)), (2, 1, ()), (3, 4, (1, 2, 3)), (2, 0, ())],
)
def test_they_are_spread_evenly_and_never_last(num_partials: int, num_steps: int, wanted: tuple[int, ...]) -> None:
    assert preview_steps(num_partials, num_steps) == wanted


def shown(pipeline: Any, arguments: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """The pictures after each step, and the last one."""
    previews = Previews(pipeline, arguments)
    found = []

    def on_step(event: Any) -> None:
        if 0 < event.step < event.total:
            found.append(np.asarray(previews.picture(), dtype=float))

    with previews.seeing(), step_events(pipeline, 0, on_step):
        picture = call(pipeline, {**arguments, "output_type": "pil"}, seed=0).images[0]
    return found, np.asarray(picture, dtype=float)


@pytest.mark.parametrize("offload", ["none", "layerwise", "sequential"])
def test_they_lead_to_the_picture(offload: str) -> None:
    options = {"max_weight_memory": "least"} if offload == "layerwise" else {}
    pipeline = penstock.load("demo", device="cpu", offload=offload, **options)
    arguments = {"prompt": "a red circle left of a blue square", "num_inference_steps": 8, "max_sequence_length": 64}
    found, last = shown(pipeline, arguments)
    plain = np.asarray(call(pipeline, arguments, seed=0).images[0], dtype=float)
    assert np.array_equal(last, plain)
    distances = [np.abs(picture - last).mean() for picture in found]
    assert len(distances) == 7 and distances[0] > 3 * distances[-1] and distances[-1] < 1
    noise = np.abs(np.random.default_rng(0).uniform(0, 255, last.shape) - last).mean()
    assert distances[0] < noise / 4  # where the prediction leads, not the noise itself


@pytest.mark.parametrize("name", IMAGES)
def test_the_pipeline_itself_decodes_them(name: str) -> None:
    pipeline = zoo.build(name)
    assert can_preview(pipeline)
    arguments = {**zoo.ENTRIES[name].call, "output_type": "pil", "num_inference_steps": 3}
    prompts = {key: arguments[key] for key in ("prompt", "negative_prompt") if isinstance(arguments.get(key), list)}
    arguments.update({key: prompt[0] for key, prompt in prompts.items()})
    found, last = shown(pipeline, arguments)
    assert found and all(picture.shape == last.shape and np.isfinite(picture).all() for picture in found)
    assert not np.array_equal(found[0], last)
    with torch.inference_mode():
        again, _ = shown(pipeline, arguments)
    assert np.array_equal(found[0], again[0])


def test_pipelines_without_a_scheduler_show_none() -> None:
    class Other:
        def __call__(self, prompt: str) -> None:
            """Has nothing to show."""

    assert not can_preview(Other())

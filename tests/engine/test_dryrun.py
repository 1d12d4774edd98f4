"""A pipeline's own checks and defaults, found out without its components."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from penstock.engine.dryrun import dry_run
from penstock.models.sizes import call_parameters
from tests import zoo

PICTURE = Image.new("RGB", (64, 64), "red")
SIZES = ("width", "height", "num_frames")


def call_of(name: str, *without: str) -> dict[str, Any]:
    """An entry's own call, for one prompt."""
    call = {key: value for key, value in zoo.ENTRIES[name].call.items() if key not in without}
    return {key: value[0] if "prompt" in key and isinstance(value, list) else value for key, value in call.items()}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_no_call_of_the_zoo_is_refused_and_no_component_works(name: str) -> None:
    pipeline, call = zoo.build(name), call_of(name)

    def never(*args: Any) -> None:
        raise AssertionError("a component was called")

    for component in pipeline.components.values():
        for module in component.modules() if isinstance(component, torch.nn.Module) else ():
            module.register_forward_pre_hook(never)
    before, state = {**vars(pipeline)}, torch.get_rng_state()
    run = dry_run(pipeline, call)
    assert run.refusal is None
    assert vars(pipeline) == before and torch.equal(torch.get_rng_state(), state)
    bins = "use_resolution_binning" in call_parameters(type(pipeline))
    for side in SIZES:
        assert side not in call or bins or run.values[side] == call[side]


@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl", "lumina2"])
def test_what_it_fills_in_is_what_the_plain_pipeline_makes(name: str) -> None:
    pipeline, call = zoo.build(name), call_of(name, "width", "height")
    assert call_parameters(type(pipeline))["width"].default is None
    values = dry_run(pipeline, call).values
    made = pipeline(**{**call, "num_inference_steps": 1, "output_type": "pil"}).images[0]
    assert (values["width"], values["height"]) == made.size


def test_frames_and_sizes_that_are_filled_in_after_the_encoder() -> None:
    pipeline = zoo.build("cogvideox")
    values = dry_run(pipeline, call_of("cogvideox", *SIZES)).values
    config = pipeline.transformer.config
    assert values["num_frames"] == config.sample_frames and values["height"] == 8 * config.sample_height
    pipeline = zoo.build("flux2")  # encodes its prompt first
    values = dry_run(pipeline, call_of("flux2", *SIZES)).values
    assert values["width"] == pipeline.default_sample_size * pipeline.vae_scale_factor


def test_checks_see_what_is_filled_in() -> None:
    pipeline = zoo.build("flux")
    with pytest.raises(TypeError):  # which hid all other rules
        pipeline.check_inputs("x", None, None, None, max_sequence_length=9999)
    refusal = dry_run(pipeline, {"prompt": "x", "max_sequence_length": 9999}).refusal
    assert isinstance(refusal, ValueError) and "9999" in str(refusal)


def test_what_is_raised_after_the_encoder_is_a_refusal() -> None:
    call = {"prompt": "x", "image": PICTURE, "height": 64, "width": 64, "strength": 0.0}
    refusal = dry_run(zoo.build("flux_img2img"), call).refusal
    assert refusal is not None and "0" in str(refusal)


def test_an_error_that_the_copy_may_have_caused_is_none() -> None:
    class Curious(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt: str, width: int = 8, generator: Any = None) -> Any:
            embeds, *_ = self.encode_prompt(prompt, "cpu", 1, False), None
            width *= 2
            first, second = embeds
            return int(torch.zeros(3).view(first + second, 7))

    stock = zoo.build("sd15")
    run = dry_run(Curious(**stock.components, requires_safety_checker=False), {"prompt": "x"})
    assert run.refusal is None and run.values["width"] == 16

"""What is refused before weights load, and what runs with a note."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from penstock.engine.checks import (
    PACKS_FRAMES,
    Effective,
    check_arguments,
    check_schedule,
    default_values,
    effect_notes,
    needed_pictures,
)
from penstock.errors import RequestError
from penstock.models.sizes import call_parameters
from tests import zoo


@pytest.fixture(scope="module")
def flux() -> Any:
    return zoo.build("flux")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_calls_of_the_zoo_pass(name: str) -> None:
    call = dict(zoo.ENTRIES[name].call)
    for text in ("prompt", "negative_prompt"):
        if isinstance(call.get(text), list):
            call[text] = call[text][0]
    check_arguments(zoo.build(name), call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 50}, "width=50 is not a multiple of 8.* Try 48 or 56"),
        ({"height": 3}, "height=3 is not a multiple of 8.* Try 8"),
        ({"height": -64}, "height=-64 is not a whole number"),
        ({"height": 64.0}, "height=64.0 is not a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not a whole number from 1 up"),
        ({"prompt": ["a", "b"]}, "prompt is a list"),
        ({"prompt_2": ["a", "b"]}, "prompt_2 is a list"),
        ({"negative_prompt": "b"}, "negative_prompt has no effect .* true_cfg_scale=1.0: .* true_cfg_scale=4,"),
        ({"max_sequence_length": 1024}, "FluxPipeline: `max_sequence_length` cannot be greater than 512"),
    ],
)
def test_what_flux_cannot_do(arguments: dict[str, Any], message: str, flux: Any) -> None:
    with pytest.raises(RequestError, match=message):
        check_arguments(flux, {"prompt": "x", "height": 64, "width": 64, **arguments})


def test_schedules_say_how_many_steps_there_are() -> None:
    check_schedule({"sigmas": [1.0, 0.5]})
    check_schedule({"sigmas": [1.0, 0.5], "num_inference_steps": 2})
    for arguments, message in (
        ({"sigmas": []}, "sigmas is empty"),
        ({"timesteps": [3, 2, 1], "num_inference_steps": 7}, "3 timesteps mean 3 steps, and num_inference_steps=7"),
    ):
        with pytest.raises(RequestError, match=message):
            check_schedule(arguments)


def test_pipelines_own_rule_of_guidance_counts() -> None:
    """Z-Image compares two predictions from any guidance above 0 on; SDXL above 1."""
    arguments = {"prompt": "x", "negative_prompt": "y"}
    check_arguments(zoo.build("z_image"), {**arguments, "guidance_scale": 0.5})
    with pytest.raises(RequestError, match="guidance is off"):
        check_arguments(zoo.build("z_image"), {**arguments, "guidance_scale": 0.0})
    with pytest.raises(RequestError, match="guidance is off"):
        check_arguments(zoo.build("sdxl"), {**arguments, "guidance_scale": 1.0})
    check_arguments(zoo.build("ltx2"), {**arguments, "guidance_scale": 1.0})  # its sound is guided by itself


def test_pipeline_that_bins_its_size_takes_any() -> None:
    pipeline = zoo.build("sana")
    check_arguments(pipeline, {"prompt": "x", "width": 1000, "height": 1010})
    with pytest.raises(RequestError, match="width=1001 is not a multiple"):
        check_arguments(pipeline, {"prompt": "x", "width": 1001, "height": 1024, "use_resolution_binning": False})


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if PACKS_FRAMES.match(name)))
def test_frames_that_stock_classes_default_to_are_accepted(name: str) -> None:
    cls = getattr(diffusers, name)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        return
    frames = getattr(call_parameters(cls).get("num_frames"), "default", None)
    factor = 8 if name.startswith("LTX") else 4
    assert not isinstance(frames, int) or (frames - 1) % factor == 0


def test_picture_may_come_as_something_else() -> None:
    check_arguments(zoo.build("ltx_i2v"), {"prompt": "x", "latents": torch.zeros(1)})


def test_negative_prompt_with_guidance(flux: Any) -> None:
    check_arguments(flux, {"prompt": "x", "negative_prompt": "y", "true_cfg_scale": 4.0})


def test_frames_that_the_vae_does_not_pack() -> None:
    with pytest.raises(RequestError, match="num_frames=4 is not one more than a multiple of 4.* Try 1 or 5"):
        check_arguments(zoo.build("wan21"), {"prompt": "x", "num_frames": 4})


def test_picture_to_picture_needs_a_picture() -> None:
    with pytest.raises(RequestError, match="FluxImg2ImgPipeline needs 'image'"):
        check_arguments(zoo.build("flux_img2img"), {"prompt": "x"})


def test_required_argument() -> None:
    with pytest.raises(RequestError, match="StrangerPipeline needs 'prompt'"):
        check_arguments(zoo.build("stranger"), {})


@pytest.mark.parametrize("has_embedding", [True, False])
def test_guidance_without_an_embedding_is_noted(has_embedding: bool) -> None:
    pipeline = zoo.build("flux")
    pipeline.transformer.register_to_config(guidance_embeds=has_embedding)
    notes = effect_notes(pipeline, {"guidance_scale": 3.5})
    assert [note.split(":")[0] for note in notes] == ([] if has_embedding else ["guidance_scale has no effect"])
    assert effect_notes(pipeline, {}) == []


@pytest.mark.parametrize("name", ["sana", "flux2_klein", "sdxl", "wan21"])
def test_guidance_that_compares_predictions_is_not_noted(name: str) -> None:
    assert effect_notes(zoo.build(name), {"guidance_scale": 4.5}) == []


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"max_sequence_length": 9999}, "max_sequence_length"),
        ({"prompt": None}, "prompt"),
        ({"prompt_embeds": torch.zeros(1, 2, 4)}, "prompt"),
    ],
)
def test_the_pipelines_own_check_runs_without_a_size_and_names_the_argument(
    arguments: dict[str, Any], param: str, flux: Any
) -> None:
    with pytest.raises(RequestError, match="^FluxPipeline: ") as caught:
        check_arguments(flux, {"prompt": "x", **arguments})
    assert caught.value.param == param


def test_what_is_left_out_is_filled_in(flux: Any) -> None:
    side = flux.default_sample_size * flux.vae_scale_factor
    assert check_arguments(flux, {"prompt": "x"}) == Effective(width=side, height=side, num_inference_steps=28)
    given = check_arguments(flux, {"prompt": "x", "width": 64, "num_inference_steps": 3})
    assert given == Effective(width=64, height=side, num_inference_steps=3)
    frames = check_arguments(zoo.build("cogvideox"), {"prompt": "x"}).num_frames
    assert frames == zoo.build("cogvideox").transformer.config.sample_frames


def test_inpainting_needs_a_mask() -> None:
    pipeline = diffusers.FluxInpaintPipeline(**zoo.build("flux_img2img").components)
    arguments = {"prompt": "x", "image": Image.new("RGB", (64, 64))}
    with pytest.raises(RequestError, match="needs 'mask_image'") as caught:
        check_arguments(pipeline, arguments)
    assert caught.value.param == "mask_image" and needed_pictures(type(pipeline)) == ["image", "mask_image"]
    check_arguments(pipeline, {**arguments, "mask_image": Image.new("L", (64, 64), 255)})


@pytest.mark.parametrize("owner", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.FluxImg2ImgPipeline])
def test_a_strength_that_leaves_no_step_is_refused(owner: Any) -> None:
    """Stable Diffusion fails in its scheduler then, Flux after its encoder."""
    is_flux = owner is diffusers.FluxImg2ImgPipeline
    stock = zoo.build("flux_img2img" if is_flux else "sd15")
    pipeline = stock if is_flux else owner(**stock.components, requires_safety_checker=False)
    arguments = {"prompt": "x", "image": Image.new("RGB", (64, 64)), "num_inference_steps": 4}
    with pytest.raises(RequestError) as caught:
        check_arguments(pipeline, {**arguments, "strength": 0.0})
    assert caught.value.param == "strength"
    check_arguments(pipeline, {**arguments, "strength": 0.5})


def test_a_size_that_follows_the_picture_is_not_the_pipelines_own() -> None:
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**zoo.build("sd15").components, requires_safety_checker=False)
    assert default_values(pipeline, {}).width is None
    made = check_arguments(pipeline, {"prompt": "x", "image": Image.new("RGB", (48, 32))})
    assert (made.width, made.height) == (48, 32)
    assert default_values(zoo.build("flux_img2img"), {}).width == 512

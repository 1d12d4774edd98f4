"""What a pipeline cannot do without is read from its source."""

from __future__ import annotations

import diffusers
import pytest

from penstock.models.needs import does_without


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("FluxImg2ImgPipeline", "image"),
        ("FluxInpaintPipeline", "mask_image"),
        ("QwenImageInpaintPipeline", "mask_image"),
        ("StableDiffusionXLInpaintPipeline", "image"),
        ("StableDiffusionControlNetPipeline", "image"),  # goes through a method of its own
        ("FluxControlNetPipeline", "control_image"),
        ("FluxControlPipeline", "control_image"),
        ("LTXImageToVideoPipeline", "image"),  # but for latents
        ("WanVideoToVideoPipeline", "video"),
        ("AnimateDiffControlNetPipeline", "conditioning_frames"),
    ],
)
def test_what_goes_into_a_processor_without_a_look_is_needed(name: str, argument: str) -> None:
    assert not does_without(getattr(diffusers, name), argument)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("FluxKontextPipeline", "image"),
        ("Flux2Pipeline", "image"),
        ("StableDiffusionPipeline", "ip_adapter_image"),
        ("WanVACEPipeline", "mask"),  # asked for in a method of its own
        ("WanAnimatePipeline", "background_video"),  # for one of two modes
        ("CosmosVideoToWorldPipeline", "video"),  # or a picture
        ("LTXConditionPipeline", "image"),
        ("WanImageToVideoPipeline", "last_image"),
    ],
)
def test_what_is_looked_for_is_not_needed(name: str, argument: str) -> None:
    assert does_without(getattr(diffusers, name), argument)


def test_a_class_without_a_source_needs_nothing() -> None:
    made: dict[str, type] = {}
    exec("class Typed:\n    def __call__(self, image=None):\n        return self.processor(image)", made)
    assert does_without(made["Typed"], "image")

"""Facts about a pipeline's call: kinds, multiples, frame rates, defaults."""

from __future__ import annotations

import json

import diffusers
import pytest

from penstock.models.sizes import call_defaults, call_parameters, frame_multiple, frame_rate, output_kind, size_multiple
from tests import zoo


@pytest.mark.parametrize("name", zoo.NAMES)
def test_kind_is_what_the_pipeline_makes(name: str) -> None:
    made = zoo.ENTRIES[name].output
    assert output_kind(type(zoo.build(name))) == ("video" if made == "video+audio" else made)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("WanVideoToVideoPipeline", "video"),
        ("SanaVideoPipeline", "video"),
        ("LTXLatentUpsamplePipeline", "video"),
        ("AnimateDiffVideoToVideoPipeline", "video"),
        ("TextToVideoZeroPipeline", "image"),
        ("LongCatAudioDiTPipeline", "audio"),
        ("StableDiffusionInpaintPipeline", "image"),
    ],
)
def test_kind_follows_the_output_class(name: str, kind: str) -> None:
    assert output_kind(getattr(diffusers, name)) == kind


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if zoo.ENTRIES[name].output.startswith("video")])
def test_frames_of_the_zoo_fit(name: str) -> None:
    assert (zoo.ENTRIES[name].call["num_frames"] - 1) % frame_multiple(zoo.build(name)) == 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_multiple_divides_the_sizes_that_run(name: str) -> None:
    multiple = size_multiple(zoo.build(name))
    call = zoo.ENTRIES[name].call
    assert call.get("width", 0) % multiple == 0
    assert call.get("height", 0) % multiple == 0
    if name not in ("stranger", "stable_audio"):
        assert multiple > 1


def test_frame_rate_prefers_what_was_asked() -> None:
    wan, ltx = zoo.build("wan21"), zoo.build("ltx")
    assert frame_rate(ltx, {"frame_rate": 12}) == 12
    assert frame_rate(ltx, {}) == 25  # its own argument's default
    assert frame_rate(wan, {}) == 16  # the table
    assert frame_rate(zoo.build("stranger"), {}) == 16


@pytest.mark.parametrize(
    ("name", "rate"), [("WanAnimatePipeline", 30), ("HunyuanVideoFramepackPipeline", 30), ("HunyuanVideoPipeline", 15)]
)
def test_longest_prefix_tells_the_frame_rate(name: str, rate: int) -> None:
    cls = getattr(diffusers, name)
    assert frame_rate(object.__new__(cls), {}) == rate


def test_defaults_are_json() -> None:
    defaults = call_defaults(type(zoo.build("flux")))
    assert json.loads(json.dumps(defaults)) == defaults
    assert defaults["num_inference_steps"] == 28
    assert "self" not in call_parameters(type(zoo.build("flux")))

"""Requests against a pipeline's own signature: everything arrives, or is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from penstock.engine.arguments import call_arguments, check_defaults, shown_arguments
from penstock.errors import ModelError, RequestError
from penstock.models.sizes import call_parameters
from penstock.request import GenerationRequest
from tests import zoo


@pytest.fixture(scope="module")
def flux() -> Any:
    return zoo.build("flux")


def arguments(pipeline: Any, **fields: Any) -> dict[str, Any]:
    return call_arguments(GenerationRequest(**fields), pipeline, {})


def test_every_field_of_a_request_arrives_or_is_refused(tmp_path: Path) -> None:
    """Walks all fields over all pipelines: none is ever dropped."""
    picture = tmp_path / "in.png"
    Image.new("RGB", (64, 64)).save(picture)
    values = {
        "prompt": "x",
        "negative_prompt": "y",
        "width": 192,  # the height comes with it: some pipelines take both or none
        "height": 192,
        "num_inference_steps": 3,
        "num_frames": 9,
        "image": str(picture),
    }
    elsewhere = {"num_images", "seed", "arguments", "frame_rate", "pictures", "opens_files"}  # tested by themselves
    assert set(values) | elsewhere == {item.name for item in dataclasses.fields(GenerationRequest)}
    arrived = set()
    for name in zoo.NAMES:
        pipeline = zoo.build(name)
        for field, value in values.items():
            takes = call_parameters(type(pipeline))
            needed = {"image": str(picture)} if "image" in zoo.ENTRIES[name].call else {}
            settings = {"true_cfg_scale": "4"} if "true_cfg_scale" in takes else {}
            fields = {"prompt": "a", **needed, "arguments": settings, field: value}
            if field in ("width", "height") and field in takes:
                fields |= {"width": 192, "height": 192}
            if field in takes:
                assert field in arguments(pipeline, **fields), name
                arrived.add(field)
            else:
                with pytest.raises(RequestError, match=f"takes no '{field}'"):
                    arguments(pipeline, **fields)
    assert arrived == set(values)


def test_pictures_are_opened_and_those_that_no_file_may_be_opened_for_are_refused(tmp_path: Path) -> None:
    pipeline = zoo.build("flux_img2img")
    paths = tuple(str(tmp_path / f"{name}.png") for name in ("one", "two"))
    for number, path in enumerate(paths):
        Image.new("RGB", (64, 64 + number)).save(path)
    given = arguments(pipeline, prompt="x", pictures={"image": paths[:1]})
    assert isinstance(given["image"], Image.Image)
    assert [picture.height for picture in arguments(pipeline, prompt="x", pictures={"image": paths})["image"]] == [
        64,
        65,
    ]
    with pytest.raises(RequestError, match="'image' is given twice") as caught:
        arguments(pipeline, prompt="x", image=paths[0], pictures={"image": paths})
    assert caught.value.param == "image"
    with pytest.raises(RequestError, match="takes no 'mask'"):
        arguments(pipeline, prompt="x", pictures={"mask": paths})
    text = {"image": f"@{paths[0]}"}
    assert isinstance(arguments(pipeline, prompt="x", arguments=text)["image"], Image.Image)
    with pytest.raises(RequestError, match="a picture is wanted") as caught:
        arguments(pipeline, prompt="x", arguments=text, opens_files=False)
    assert caught.value.param == "image"


def test_unknown_argument_is_named_with_a_suggestion(flux: Any) -> None:
    with pytest.raises(
        RequestError, match=r"FluxPipeline takes no 'guidance_scael' \(did you mean 'guidance_scale'\?\)"
    ):
        arguments(flux, prompt="x", arguments={"guidance_scael": "3"})


def test_field_that_the_pipeline_does_not_take(flux: Any) -> None:
    with pytest.raises(RequestError, match="FluxPipeline takes no 'num_frames'.* It takes prompt, prompt_2"):
        arguments(flux, prompt="x", num_frames=5)


def test_settings_are_read_as_the_signature_wants(flux: Any) -> None:
    settings = {"guidance_scale": "3.5", "prompt_2": "12", "max_sequence_length": "64"}
    got = arguments(flux, prompt="x", arguments=settings)
    assert (got["guidance_scale"], got["prompt_2"], got["max_sequence_length"]) == (3.5, "12", 64)


@pytest.mark.parametrize(("name", "text"), [("guidance_scale", "much"), ("max_sequence_length", "1.5")])
def test_setting_of_the_wrong_type(flux: Any, name: str, text: str) -> None:
    with pytest.raises(RequestError, match=f"{name}='{text}' does not fit: .* is wanted by FluxPipeline"):
        arguments(flux, prompt="x", arguments={name: text})


def test_what_penstock_fills_itself_cannot_be_set(flux: Any) -> None:
    with pytest.raises(RequestError, match="'generator' cannot be set: use seed"):
        arguments(flux, prompt="x", arguments={"generator": "1"})


def test_a_schedule_is_not_counted_against_makers_defaults(flux: Any) -> None:
    request = GenerationRequest(prompt="x", arguments={"sigmas": [1.0, 0.5]})
    assert call_arguments(request, flux, {"num_inference_steps": 8})["sigmas"] == [1.0, 0.5]
    with pytest.raises(RequestError, match="Leave one of them out"):
        call_arguments(dataclasses.replace(request, num_inference_steps=7), flux, {})


def test_nothing_is_given_twice(flux: Any) -> None:
    with pytest.raises(RequestError, match="'height' is given twice"):
        arguments(flux, prompt="x", height=64, arguments={"height": "32"})


def test_makers_defaults_fill_what_is_left_open(flux: Any) -> None:
    defaults = {"height": 32, "num_inference_steps": 9}
    got = call_arguments(GenerationRequest(prompt="x", height=64), flux, defaults)
    assert got == {"prompt": "x", "height": 64, "num_inference_steps": 9}


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"heigth": 64}, r"takes no 'heigth' \(did you mean 'height'\?\)"),
        ({"height": "64"}, r"height=.*64.* does not fit"),
        ({"guidance_scale": [1]}, "guidance_scale="),
    ],
)
def test_makers_defaults_are_checked(defaults: dict[str, Any], message: str, flux: Any) -> None:
    with pytest.raises(ModelError, match=message):
        check_defaults(defaults, type(flux))
    check_defaults({"height": 64, "guidance_scale": 2, "prompt_2": "y"}, type(flux))


def test_frame_rate_goes_to_pipelines_that_take_it_and_to_no_picture(flux: Any) -> None:
    assert arguments(zoo.build("ltx"), prompt="x", frame_rate=12.0)["frame_rate"] == 12
    assert "frame_rate" not in arguments(zoo.build("wan21"), prompt="x", frame_rate=12.0)
    with pytest.raises(RequestError, match="fps is for videos, and FluxPipeline makes images"):
        arguments(flux, prompt="x", frame_rate=12.0)


def test_frame_rates_have_fractions_whatever_the_annotation_says() -> None:
    got = arguments(zoo.build("ltx"), prompt="x", arguments={"frame_rate": "23.976"})
    assert got["frame_rate"] == 23.976


def test_latents_make_one_picture(flux: Any) -> None:
    with pytest.raises(RequestError, match="would make equal pictures"):
        arguments(flux, prompt="x", num_images=2, arguments={"latents": torch.zeros(1)})


def test_pictures_as_settings(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8), "red").save(tmp_path / "in.png")
    pipeline = zoo.build("flux_img2img")
    got = arguments(pipeline, prompt="x", arguments={"image": f"@{tmp_path}/in.png", "prompt_2": "@home"})
    assert got["image"].size == (16, 8)
    assert got["prompt_2"] == "@home"  # text where text is wanted
    with pytest.raises(RequestError, match="does not exist"):
        arguments(pipeline, prompt="x", arguments={"image": "@nowhere.png"})


def test_shown_arguments_are_json(tmp_path: Path) -> None:
    shown = shown_arguments({"image": Image.new("RGB", (3, 2)), "size": (1, 2), "kind": {1}, "scale": 0.5})
    assert shown == {"image": "picture 3x2", "size": [1, 2], "kind": "{1}", "scale": 0.5}

"""Every field of a request is honoured, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.request import MAX_SEED
from penstock.server.asks import adapters, check_model, wanted
from penstock.server.failures import ApiError
from penstock.server.pipeline import Pipeline
from penstock.server.schemas import EditAsk, ImageAsk, VariationAsk, VideoAsk
from penstock.server.settings import ServeConfig
from tests.server.engine_double import described

IMAGE = Pipeline(described())
VIDEO = Pipeline(described("video"))


def image(pipeline: Pipeline = IMAGE, settings: ServeConfig | None = None, **fields: Any) -> Any:
    return wanted(ImageAsk(**{"prompt": "x", **fields}), pipeline, settings or ServeConfig(), {})


def video(settings: ServeConfig | None = None, **fields: Any) -> Any:
    return wanted(VideoAsk(**{"prompt": "x", **fields}), VIDEO, settings or ServeConfig(), {})


def refused(call: Any, *arguments: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **fields)
    return caught.value


def test_fields_reach_the_request() -> None:
    want = image(size="128x64", n=3, seed=5, num_inference_steps=9, negative_prompt="y", guidance_scale=2.0)
    request = want.request
    assert (request.width, request.height, request.num_images, request.seed) == (128, 64, 3, 5)
    assert (request.num_inference_steps, request.negative_prompt, request.prompt) == (9, "y", "x")
    assert request.arguments == {"guidance_scale": 2.0} and request.opens_files is False
    assert want.size == "128x64" and want.seconds is None
    assert want.arguments == {
        "prompt": "x",
        "size": "128x64",
        "n": 3,
        "seed": 5,
        "num_inference_steps": 9,
        "negative_prompt": "y",
        "guidance_scale": 2.0,
    }


def test_what_is_left_out_is_the_pipelines_own() -> None:
    want = image(size="auto")
    assert (want.request.width, want.request.height, want.size) == (None, None, "64x64")
    assert image(width=128).size == "128x64"


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {image().request.seed for _ in range(8)}
    assert len(seeds) > 1 and all(seed is not None and 0 <= seed < MAX_SEED for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"size": "64x64", "width": 64}, 400, "size"),
        ({"size": "8192x8192"}, 413, "size"),
        ({"width": 999_936, "height": 64}, 413, "width"),
        ({"n": 11}, 400, "n"),
        ({"n": 10**20}, 400, "n"),
        ({"num_inference_steps": 1001}, 400, "num_inference_steps"),
        ({"strenght": 0.5}, 400, "strenght"),
        ({"style": "vivid"}, 400, "style"),
        ({"guidance_scale": "x" * 100_001}, 400, "guidance_scale"),
        ({"guidance_scale": "3\0"}, 400, "guidance_scale"),
        ({"output_compression": 10}, 400, "output_compression"),
        ({"partial_images": 1}, 400, "partial_images"),
        ({"lora": [{"name": "crayon"}]}, 400, "lora"),
        ({"prompt": None}, 400, "prompt"),
    ],
)
def test_refusals(fields: dict[str, Any], status: int, param: str) -> None:
    error = refused(image, **fields)
    assert (error.status, error.param) == (status, param)


STEPPED = described()
for name in ("sigmas", "timesteps", "prior_num_inference_steps", "decode_timestep"):
    STEPPED["parameters"][name] = {"type": {}, "default": None, "is_picture": False, "is_required": False}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigmas", [1.0, 0.5, 0.1]),
        ("timesteps", [9, 5, 1]),
        ("timesteps", "[9, 5, 1]"),
        ("prior_num_inference_steps", 3),
        ("prior_num_inference_steps", "3"),
    ],
)
def test_no_way_leads_around_the_most_steps(name: str, value: Any) -> None:
    few = {"num_inference_steps": 2} if name.startswith("prior") else {}
    error = refused(image, Pipeline(STEPPED), ServeConfig(max_steps=2), **few, **{name: value})
    assert (error.status, error.param) == (400, name) and "The most is 2" in error.message
    assert image(Pipeline(STEPPED), ServeConfig(max_steps=3), **few, **{name: value}).request.arguments == {name: value}


def test_what_is_no_schedule_is_no_number_of_steps() -> None:
    settings = ServeConfig(max_steps=4)
    for value in (900, "900", 0.05, "[", "[" * 100_000):
        assert image(Pipeline(STEPPED), settings, decode_timestep=value)


def test_what_the_pipeline_makes_by_itself_is_limited_as_well() -> None:
    error = refused(image, settings=ServeConfig(max_steps=3))
    assert error.param == "num_inference_steps" and "DoublePipeline makes 4 steps of its own" in error.message
    assert image(settings=ServeConfig(max_steps=3), num_inference_steps=3)
    error = refused(image, settings=ServeConfig(max_pixels="32x32"))
    assert (error.status, error.param) == (413, "size") and "32x32" in error.message
    assert refused(video, ServeConfig(max_frames=4)).param == "num_frames"
    assert video(ServeConfig(max_frames=4), num_frames=1)


def test_more_pictures_than_there_are_seeds_for_are_refused_with_the_real_most() -> None:
    assert refused(image, n=10**20).message.endswith("The most is 10.")
    assert refused(image, settings=ServeConfig(max_images=5000), n=1001).message.endswith("The most is 1000.")


def test_a_field_of_another_endpoint_is_refused_without_advice_on_its_values() -> None:
    assert refused(image, seconds="4").message.startswith("DoublePipeline takes no 'seconds'")
    assert "png" not in refused(video, output_format="png").message
    assert refused(image, style="vivid").message.endswith(
        "is no field here. There are no styles here: say it in the prompt."
    )


def test_a_name_without_end_is_cut() -> None:
    for name in ("x" * 2**20, "\0'" * 2**19):
        error = refused(image, **{name: 1})
        assert error.param == name[:80] and len(error.message) < 1000


def test_a_variation_needs_no_prompt() -> None:
    assert wanted(VariationAsk(), IMAGE, ServeConfig(), {}).request.prompt is None


def test_a_pipeline_that_makes_one_size() -> None:
    plain = described()
    for name in ("width", "height", "negative_prompt"):
        del plain["parameters"][name]
    assert refused(image, Pipeline(plain), size="64x64").param == "size"
    assert refused(image, Pipeline(plain), negative_prompt="y").param == "negative_prompt"


def test_pictures_come_as_files_only() -> None:
    pipeline = Pipeline(described(accepts_image=True))
    assert refused(image, pipeline, mask_image="/etc/passwd").param == "mask_image"
    want = wanted(EditAsk(prompt="x"), pipeline, ServeConfig(), {"image": ("a.png",)})
    assert want.request.pictures == {"image": ("a.png",)} and want.request.arguments == {}


def test_formats() -> None:
    assert image().format.name == "png" and image(output_compression=100).format.quality is None
    assert image(output_format="webp", output_compression=0).format.quality == 0
    assert image(stream=True, partial_images=2).num_partials == 2


@pytest.mark.parametrize(
    ("fields", "frames", "seconds"),
    [
        ({}, None, "0.6"),
        ({"seconds": "4"}, 33, "4.1"),
        ({"seconds": "0.1"}, 1, "0.1"),
        ({"seconds": "4", "fps": 24}, 97, "4"),
        ({"num_frames": 9}, 9, "1.1"),
        ({"num_frames": 9, "fps": 9}, 9, "1"),
    ],
)
def test_seconds_become_frames_that_the_pipeline_can_make(fields: dict[str, Any], frames: int, seconds: str) -> None:
    want = video(**fields)
    assert (want.request.num_frames, want.seconds) == (frames, seconds)
    assert frames is None or frames % 4 == 1


def test_video_limits() -> None:
    assert refused(video, seconds="4", num_frames=9).param == "seconds"
    error = refused(video, ServeConfig(max_frames=17), seconds="4")
    assert (error.status, error.param) == (413, "seconds") and "2.1 s" in error.message
    assert refused(video, ServeConfig(max_frames=17), num_frames=33).param == "num_frames"


def test_a_frame_rate_has_one_name() -> None:
    error = refused(video, frame_rate=1e-9)
    assert (error.status, error.param) == (400, "frame_rate") and "fps" in error.message


def test_adapters_by_name_only(tmp_path: Path) -> None:
    (tmp_path / "crayon.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.safetensors").mkdir()
    settings = ServeConfig(lora_dir=str(tmp_path))
    assert adapters(settings) == ["crayon"] and adapters(ServeConfig()) == []
    (lora,) = image(settings=settings, lora=[{"name": "crayon", "scale": 0.5}]).loras
    assert (lora.name, lora.scale, lora.path) == ("crayon", 0.5, str(tmp_path / "crayon.safetensors"))
    assert "did you mean 'crayon'" in refused(image, settings=settings, lora=[{"name": "crayn"}]).message
    plain = described()
    plain["takes_lora"] = False
    assert refused(image, Pipeline(plain), settings, lora=[{"name": "crayon"}]).param == "lora"


def test_adapters_of_a_home_folder_and_of_names_with_full_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "loras").mkdir()
    for name in ("v1.5", "v1_5"):
        (tmp_path / "loras" / f"{name}.safetensors").touch()
    settings = ServeConfig(lora_dir="~/loras")
    assert adapters(settings) == ["v1.5", "v1_5"]
    one, other = image(settings=settings, lora=[{"name": "v1.5"}, {"name": "v1_5"}]).loras
    assert one.path == str(tmp_path / "loras" / "v1.5.safetensors")
    assert "." not in one.name and one.name != other.name == "v1_5"  # peft makes modules of them


def test_fields_that_are_large_together() -> None:
    error = refused(image, guidance_scale=list(range(300_000)))
    assert error.status == 413


def test_models() -> None:
    check_model(None, ["a", "b"])
    check_model("b", ["a", "b"])
    assert refused(check_model, "c", ["a", "b"]).status == 404

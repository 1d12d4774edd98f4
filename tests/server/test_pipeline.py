"""What the model is and takes, in a server's questions."""

from __future__ import annotations

import pytest

from penstock.server.pipeline import Pipeline, seconds_of
from tests.server.engine_double import described


def test_questions() -> None:
    plain, rich = Pipeline(described()), Pipeline(described("video", accepts_image=True))
    assert (plain.kind, plain.name, plain.frame_rate, plain.default_num_frames) == (
        "image",
        "DoublePipeline",
        None,
        None,
    )
    assert (rich.kind, rich.frame_rate, rich.default_num_frames) == ("video", 8.0, 5)
    assert not plain.accepts_image and plain.mask is None and plain.pictures == []
    assert rich.accepts_image and rich.accepts_several_images and rich.mask == "mask_image"
    assert rich.pictures == ["image", "mask_image"]
    assert plain.takes("guidance_scale") and not plain.takes("strength") and plain.takes_lora
    assert plain.requires("prompt") and not plain.requires("negative_prompt") and not rich.requires("prompt")
    assert plain.size(None, 128) == (64, 128)


def test_unknown_fields_get_a_hint() -> None:
    pipeline = Pipeline(described())
    assert "did you mean 'guidance_scale'" in pipeline.unknown("guidance_scal", [])
    assert "did you mean 'quality'" in pipeline.unknown("qualiti", ["quality"])
    assert "Give 'seed'" in pipeline.unknown("generator", [])
    assert "It takes prompt, negative_prompt, width" in pipeline.unknown("zzz", [])


@pytest.mark.parametrize(("size", "most"), [((8192, 4096), 16_000_000), ((100, 1000), 1_000_000), ((9, 9), 64)])
def test_largest_size_keeps_the_shape_and_the_limit(size: tuple[int, int], most: int) -> None:
    width, height = Pipeline(described()).largest_size(*size, most)
    assert width % 8 == height % 8 == 0 and width * height <= most
    assert abs(width / height - size[0] / size[1]) <= 0.1 * size[0] / size[1]


@pytest.mark.parametrize("frames", [1, 5, 33, 97])
def test_frames_of_a_duration_come_back(frames: int) -> None:
    assert Pipeline(described("video")).num_frames(frames / 8, 8.0) == frames


def test_frames_of_a_pipeline_that_takes_any() -> None:
    assert Pipeline({**described("video"), "frame_multiple": 1}).num_frames(4, 8.0) == 32


def test_seconds() -> None:
    assert [seconds_of(9, 1000.0), seconds_of(2000, 1e-5)] == ["0.009", "200000000"]
    assert [seconds_of(33, 8.0), seconds_of(32, 8.0), seconds_of(None, 8.0), seconds_of(5, None)] == [
        "4.1",
        "4",
        "0",
        "0",
    ]

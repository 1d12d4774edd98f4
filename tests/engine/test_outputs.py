"""What pipelines return, in every form that stock pipelines use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.engine.outputs import read_output, read_outputs, sampling_rate, to_array
from penstock.errors import GenerationError

PIPELINE = SimpleNamespace(vocoder=SimpleNamespace(config=SimpleNamespace(output_sampling_rate=8000)))
PICTURE = Image.new("RGB", (6, 4), (255, 0, 128))
FLOATS = np.asarray(PICTURE, dtype=np.float32) / 255


@pytest.mark.parametrize(
    "images",
    [
        [PICTURE],
        PICTURE,
        FLOATS[None],
        torch.from_numpy(FLOATS).permute(2, 0, 1)[None],
        [[PICTURE]],
        np.asarray(PICTURE)[None],
    ],
)
def test_pictures(images: Any) -> None:
    output = read_output(PIPELINE, SimpleNamespace(images=images))
    assert output.kind == "image"
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(PICTURE))


def test_grey_pictures_and_values_out_of_range() -> None:
    grey = np.array([[[[-1.0], [0.5], [2.0], [np.nan]]]])
    output = read_output(PIPELINE, SimpleNamespace(images=grey))
    assert np.asarray(output.images[0])[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize(
    "frames",
    [
        [[PICTURE] * 3],
        np.stack([FLOATS] * 3)[None],
        torch.from_numpy(np.stack([FLOATS] * 3)).permute(0, 3, 1, 2)[None],
        [np.stack([FLOATS] * 3)],
    ],
)
def test_videos(frames: Any) -> None:
    output = read_output(PIPELINE, SimpleNamespace(frames=frames))
    assert output.kind == "video" and output.audio is None
    assert [image.size for image in output.images] == [(6, 4)] * 3


@pytest.mark.parametrize("sound", [np.zeros((1, 2, 50)), torch.zeros(1, 2, 50, dtype=torch.bfloat16)])
def test_sound_beside_a_video(sound: Any) -> None:
    output = read_output(PIPELINE, SimpleNamespace(frames=[[PICTURE]], audio=sound))
    assert output.kind == "video"
    assert output.audio is not None and output.audio.shape == (2, 50)
    assert output.sampling_rate_hz == 8000


@pytest.mark.parametrize("sound", [np.zeros((1, 50)), [np.zeros(50)]])
def test_mono_sound(sound: Any) -> None:
    output = read_output(PIPELINE, SimpleNamespace(audios=sound))
    assert output.kind == "audio" and output.images == []
    assert output.audio is not None and output.audio.shape == (1, 50)


@pytest.mark.parametrize(
    "output", [{"images": [PICTURE, PICTURE]}, {"frames": [[PICTURE], [PICTURE]]}, {"audios": np.zeros((2, 50))}]
)
def test_nothing_of_a_batch_is_dropped(output: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="returned 2 results from one call"):
        read_output(PIPELINE, SimpleNamespace(**output))


def test_each_of_a_batch_is_read() -> None:
    pictures = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    outputs = read_outputs(PIPELINE, SimpleNamespace(images=pictures), 2)
    assert [np.asarray(output.images[0]).tolist() for output in outputs] == [
        np.asarray(one).tolist() for one in pictures
    ]
    sounds = torch.arange(8.0).reshape(2, 1, 4)
    videos = read_outputs(PIPELINE, SimpleNamespace(frames=[pictures, pictures[:1]], audio=sounds), 2)
    assert [len(output.images) for output in videos] == [2, 1]
    assert videos[1].audio is not None and videos[1].audio.tolist() == [[4, 5, 6, 7]]
    with pytest.raises(GenerationError, match="2 results from one call; penstock reads 3"):
        read_outputs(PIPELINE, SimpleNamespace(images=pictures), 3)


def test_output_without_media_is_refused() -> None:
    with pytest.raises(GenerationError, match="holds no images, frames or audio"):
        read_output(PIPELINE, SimpleNamespace(image_embeds=torch.zeros(1)))


def test_sound_without_a_rate_is_refused() -> None:
    with pytest.raises(GenerationError, match="none of its components names a sampling rate"):
        sampling_rate(SimpleNamespace())


def test_arrays_keep_whole_numbers_whole() -> None:
    assert to_array([PICTURE, PICTURE]).shape == (2, 4, 6, 3)
    assert to_array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32

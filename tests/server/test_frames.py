"""The first frame of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penstock.media.video import write_video
from penstock.request import GenerationResult
from penstock.server.frames import write_first_frame


@pytest.fixture
def video(tmp_path: Path) -> Path:
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "blue")]
    result = GenerationResult(kind="video", seed=0, images=frames, frame_rate=8.0, arguments={}, elapsed_s=0.1)
    write_video(result, tmp_path / "a.mp4", {})
    return tmp_path / "a.mp4"


def test_the_first_one_is_taken(video: Path, tmp_path: Path) -> None:
    write_first_frame(video, tmp_path / "a.png", 64 * 48)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (64, 48)
        red, _, blue = np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert red > 200 and blue < 60


def test_what_cannot_be_read(video: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    broken = tmp_path / "b.mp4"
    for content in (b"", b"no video", video.read_bytes()[:300]):
        broken.write_bytes(content)
        with pytest.raises(ValueError):
            write_first_frame(broken, target, 10**6)
    with pytest.raises(ValueError, match="more than 100 pixels"):
        write_first_frame(video, target, most_pixels=100)
    assert not target.exists()

"""Videos: frames, rate, sound and facts come back; odd sizes work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from penstock.media.facts import read_facts
from penstock.media.video import write_video
from penstock.request import GenerationResult


def make_video(size: tuple[int, int], audio: Any = None, frame_rate: float = 8.0) -> GenerationResult:
    colours = ["red", "green", "blue", "white", "black"]
    return GenerationResult(
        kind="video",
        seed=0,
        images=[Image.new("RGB", size, colour) for colour in colours],
        audio=audio,
        sampling_rate_hz=None if audio is None else 24000,
        frame_rate=frame_rate,
        arguments={},
        elapsed_s=0.0,
    )


def test_frames_come_back_in_h264(tmp_path: Path) -> None:
    video = make_video((32, 16), frame_rate=23.976)
    write_video(video, tmp_path / "a.mp4", {"seed": 3, "arguments": {"prompt": "\u00fc"}})
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate or 0) == pytest.approx(23.976, rel=1e-3)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert not container.streams.audio
    assert len(frames) == len(video.images)
    for frame, image in zip(frames, video.images, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(image).astype(int)).max() < 12
    assert read_facts(tmp_path / "a.mp4") == {"seed": 3, "arguments": {"prompt": "\u00fc"}}


def test_index_is_at_the_front(tmp_path: Path) -> None:
    write_video(make_video((32, 16)), tmp_path / "a.mp4", {})
    raw = (tmp_path / "a.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize(("size", "expected"), [((33, 17), (34, 18)), ((32, 17), (32, 18))])
def test_odd_sizes_are_padded_by_their_edge(size: tuple[int, int], expected: tuple[int, int], tmp_path: Path) -> None:
    write_video(make_video(size), tmp_path / "a.mp4", {})
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(container.streams.video[0]))
        assert (frame.width, frame.height) == expected


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_comes_back(channels: int, tmp_path: Path) -> None:
    tone = np.sin(np.arange(15000, dtype=np.float32) * 2 * np.pi * 440 / 24000) * 0.5
    write_video(make_video((32, 16), np.stack([tone] * channels)), tmp_path / "a.mp4", {})
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        assert stream.codec_context.sample_rate == 24000 and stream.codec_context.channels == channels
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
    assert samples.shape[1] >= 15000
    spectrum = np.abs(np.fft.rfft(samples[0][2048:14336]))
    assert spectrum.argmax() * 24000 / 12288 == pytest.approx(440, abs=4)

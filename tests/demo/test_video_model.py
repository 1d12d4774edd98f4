"""The shipped video model, through the public interface: colour and motion follow the prompt."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pytest
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from typer.testing import CliRunner

import penstock
from penstock.cli.app import app
from tests.server.served import served
from video.checker import check
from video.grammar import motion_prompts

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def demo() -> Any:
    return penstock.load("demo-video")


def test_classes_are_stock(demo: Any) -> None:
    assert type(demo) is LTXPipeline
    assert type(demo.transformer) is LTXVideoTransformer3DModel and type(demo.vae) is AutoencoderKLLTXVideo


def test_held_out_prompts_are_followed(demo: Any) -> None:
    prompts = motion_prompts(held_out=True)[::2]
    right = []
    for seed, prompt in enumerate(prompts):
        (result,) = penstock.generate(demo, penstock.GenerationRequest(prompt=prompt, seed=seed))
        assert len(result.images) == 17 and result.frame_rate == 8
        right.append(check(result.images, prompt).follows)
    assert sum(right) >= len(right) - 1, [p for p, ok in zip(prompts, right, strict=True) if not ok]


def test_the_prompt_and_not_the_noise_sets_colour_and_direction(demo: Any) -> None:
    for prompt in ("a red circle moving left", "a yellow circle moving down"):
        (result,) = penstock.generate(demo, penstock.GenerationRequest(prompt=prompt, seed=3))
        for asked in ("a red circle moving left", "a yellow circle moving down"):
            verdict = check(result.images, asked)
            assert (verdict.colour, verdict.direction) == (asked == prompt, asked == prompt)


def test_one_command_makes_a_clip_that_follows_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    result = CliRunner().invoke(app, ["generate", "demo-video", PROMPT, "--seed", "0", "--out", str(path)])
    assert result.exit_code == 0 and result.stderr == ""
    assert check(frames_of(path.open("rb"), 17), PROMPT).follows


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_official_client_gets_a_clip_that_follows_the_prompt(tmp_path: Path) -> None:
    with served("demo-video", tmp_path) as server, server.api(_strict_response_validation=False) as api:
        made = api.videos.create_and_poll(prompt=PROMPT, model="demo-video", seconds="4", extra_body={"seed": 0})
        assert made.status == "completed" and made.seconds == "4.1", made
        frames = frames_of(io.BytesIO(api.videos.download_content(made.id).read()), 33)
    assert check(frames, PROMPT).follows


def frames_of(file: BinaryIO, count: int) -> list[np.ndarray]:
    """The pictures of an MP4 file of 8 frames per second."""
    with file, av.open(file) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == count
    return frames

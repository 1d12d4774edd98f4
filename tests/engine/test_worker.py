"""A rank as a process: it says that it lives, answers, and leaves when it is told to, or its engine is gone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed.launcher import LAUNCHER
from penstock.engine.post import Post
from penstock.engine.rankgroup import WorkConfig
from penstock.request import GenerationRequest
from penstock.wire import Beat, Check, Checked, Close, Loading, Ready, Refused
from tests import processes, zoo

NAME = "0.0.0"


class Listener(Post):
    """A post that is open, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.address = self.open()


@pytest.fixture
def post() -> Iterator[Listener]:
    post = Listener()
    yield post
    post.close()


def start(post: Listener, model: str, stdin: bytes | None = None) -> processes.Process[bytes]:
    config = WorkConfig(
        address=post.address, name=NAME, model=model, load=LoadConfig(device="cpu"), parallel=ParallelConfig()
    )
    process = processes.Process[bytes](
        [sys.executable, "-P", "-m", "penstock.engine.worker"],
        env={**os.environ, LAUNCHER: str(os.getpid()), "TRANSFORMERS_VERBOSITY": "critical"},
        stdin=processes.PIPE,
        stdout=processes.PIPE,
        stderr=processes.STDOUT,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) if stdin is None else stdin)
    process.stdin.close()
    return process


def hear(post: Post, kind: type, timeout_s: float = 60.0) -> list[Any]:
    """All messages up to the first of a kind; that one is put last."""
    heard: list[Any] = []
    deadline_s = time.monotonic() + timeout_s
    while not any(isinstance(message, kind) for message in heard):
        assert time.monotonic() < deadline_s, heard
        heard += [message for _, message in post.hear(100)]
    return sorted(heard, key=lambda message: isinstance(message, kind))


def end(process: processes.Process[bytes]) -> tuple[int, str]:
    assert process.stdout is not None
    said = process.stdout.read().decode()
    process.stdout.close()
    return process.wait(30), said


def test_it_loads_answers_beats_and_leaves(post: Listener) -> None:
    process = start(post, "demo")
    heard = hear(post, Ready)
    assert any(isinstance(message, Loading) for message in heard)
    assert next(message for message in heard if isinstance(message, Ready)).pipeline["pipeline"] == "FluxPipeline"
    post.send(NAME, Check(7, GenerationRequest(prompt="a", num_inference_steps=1, height=65)))
    checked = hear(post, Checked)[-1]
    assert checked.number == 7 and checked.failure.param == "height"
    begun_s = time.monotonic()
    beats = [hear(post, Beat)[-1] for _ in range(3)]
    assert time.monotonic() - begun_s < 5 and beats[0].host_bytes > 100 * 2**20
    assert beats[-1].device_bytes == 14_440_700  # demo's weights in float32
    post.send(NAME, Close())
    assert end(process) == (0, "")


def test_it_beats_while_a_question_takes_its_time(post: Listener, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow.png")
    process = start(post, str(zoo.folder("flux_img2img", tmp_path)))
    hear(post, Ready)
    post.send(NAME, Check(7, GenerationRequest(prompt="a", pictures={"image": (str(tmp_path / "slow.png"),)})))
    for _ in range(4):
        assert isinstance(hear(post, Beat, timeout_s=5)[-1], Beat)
    (tmp_path / "slow.png").write_bytes(b"no picture")
    assert hear(post, Checked)[-1].failure.code == "request_invalid"
    post.send(NAME, Close())
    assert end(process) == (0, "")


def test_what_cannot_be_loaded_is_told_to_the_engine(post: Listener) -> None:
    process = start(post, "nowhere")
    refused = hear(post, Refused)[-1]
    assert refused.kind == "ModelNotFoundError" and "nowhere" in refused.message
    assert end(process) == (1, "")


def test_garbage_is_no_configuration(post: Listener) -> None:
    code, said = end(start(post, "demo", stdin=b"{}"))
    assert code == 1 and "missing required field" in said

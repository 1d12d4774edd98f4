"""The official client against `penstock serve` with real ranks: real pictures, and what a kill leaves behind."""

from __future__ import annotations

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

import penstock
from tests import zoo
from tests.processes import is_running
from tests.server.served import Served, served

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PROMPT = "a red circle left of a blue square"
SMALL: dict[str, Any] = {"_strict_response_validation": False}  # the client knows four sizes, all too large for a test
LONG: dict[str, Any] = {"num_inference_steps": 1000, "width": 160, "height": 160}


def pixels(data: str | bytes) -> np.ndarray:
    content = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=int)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served("demo", tmp_path_factory.mktemp("demo"), "--max-queue", "8") as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> list[np.ndarray]:
    """The pictures of seeds 0 to 3, made in this process."""
    request = penstock.GenerationRequest(prompt=PROMPT, seed=0, num_images=4)
    results = penstock.generate(penstock.load("demo", device="cpu"), request)
    return [np.asarray(result.images[0], dtype=int) for result in results]


def test_pictures_are_those_of_the_plain_pipeline(demo: Served, plain: list[np.ndarray]) -> None:
    with demo.api() as api:
        made = api.images.generate(prompt=PROMPT, model="demo", n=3, extra_body={"seed": 0})
        assert made.data is not None and len(made.data) == 3
        for item, wanted in zip(made.data, plain, strict=False):
            assert item.b64_json is not None and np.array_equal(pixels(item.b64_json), wanted)
        linked = api.images.generate(prompt=PROMPT, size="auto", response_format="url", extra_body={"seed": 3})
    assert linked.data is not None and linked.data[0].url is not None
    assert np.array_equal(pixels(demo.http.get(linked.data[0].url).content), plain[3])


def test_unfinished_pictures_lead_to_the_last(demo: Served, plain: list[np.ndarray]) -> None:
    with demo.api() as api:
        events = list(api.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 0}))
    assert [event.type.rpartition(".")[2] for event in events] == [*["partial_image"] * 3, "completed"]
    distances = [np.abs(pixels(event.b64_json) - plain[0]).mean() for event in events]
    assert distances[0] > distances[1] > distances[2] > distances[3] == 0


def test_bad_requests_are_400_with_the_name(demo: Served) -> None:
    with demo.api() as api:
        for body, param in (
            ({"colour": "x"}, "colour"),
            ({"width": 63}, "width"),
            ({"latents": "@/etc/passwd"}, "latents"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                api.images.generate(prompt=PROMPT, extra_body=body)
            assert caught.value.param == param
        with pytest.raises(openai.BadRequestError):
            api.images.edit(prompt=PROMPT, image=io.BytesIO(b"no picture"))


def test_many_clients_get_a_right_picture_or_are_told_to_wait(demo: Served, plain: list[np.ndarray]) -> None:
    done = threading.Event()
    slow: list[float] = []

    def watch() -> None:
        while not done.wait(0.05):
            begun_s = time.monotonic()
            assert demo.http.get("/health").status_code == 200
            slow.append(time.monotonic() - begun_s)

    def ask(number: int) -> int:
        with demo.api(timeout=120) as api:
            try:
                made = api.images.generate(prompt=PROMPT, extra_body={"seed": number % 4})
            except openai.RateLimitError as error:
                assert int(error.response.headers["retry-after"]) >= 1
                return 429
        assert made.data is not None and made.data[0].b64_json is not None
        assert np.array_equal(pixels(made.data[0].b64_json), plain[number % 4])
        return 200

    with ThreadPoolExecutor(41) as pool:
        watching = pool.submit(watch)
        answers = list(pool.map(ask, range(80)))
        done.set()
        watching.result()
    assert set(answers) == {200, 429} and slow


@pytest.mark.thorough
def test_a_rank_that_is_killed_fails_its_request_and_is_started_again(demo: Served, plain: list[np.ndarray]) -> None:
    (pid,) = demo.rank_pids()
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    with demo.api() as api:
        with pytest.raises(openai.InternalServerError) as caught:
            api.images.generate(prompt=PROMPT, extra_body=LONG)
        assert caught.value.code == "rank_died"
        demo.await_ready()
        assert demo.rank_pids() != [pid]
    threading.Timer(1.0, os.kill, (demo.rank_pids()[0], signal.SIGKILL)).start()
    with demo.api(max_retries=4) as patient:
        with pytest.raises(openai.InternalServerError):  # it may be to blame, and is not asked for again by itself
            patient.images.generate(prompt=PROMPT, extra_body=LONG)
        made = patient.images.generate(prompt=PROMPT, extra_body={"seed": 0})  # but what finds no ranks yet is
    assert made.data is not None and np.array_equal(pixels(made.data[0].b64_json or ""), plain[0])


def test_a_client_that_goes_away_ends_its_picture(demo: Served) -> None:
    with demo.api(timeout=1.0) as api, pytest.raises(openai.APITimeoutError):
        api.images.generate(prompt=PROMPT, extra_body=LONG)
    deadline_s = time.monotonic() + 20
    while any(group["num_orders"] for group in demo.http.get("/health").json()["groups"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def begin(server: Served) -> str:
    """A long job that runs, asked for by a client that waits in vain; its id."""

    def ask() -> None:
        with server.api() as api:
            try:
                api.images.generate(prompt=PROMPT, extra_body=LONG)
            except openai.OpenAIError:
                return

    threading.Thread(target=ask, daemon=True).start()
    deadline_s = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline_s
        for job in server.http.get("/v1/jobs").json()["data"]:
            if job["status"] == "in_progress":
                return str(job["id"])
        time.sleep(0.02)


@pytest.mark.thorough
def test_what_was_promised_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with served("demo", tmp_path) as server:
        with server.api() as api:
            made = api.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 0})
        assert made.data is not None and made.data[0].url is not None
        running, pids = begin(server), server.rank_pids()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    deadline_s = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    with served("demo", tmp_path) as again:
        jobs = {job["id"]: job for job in again.http.get("/v1/jobs").json()["data"]}
        assert jobs[running]["status"] == "failed" and jobs[running]["error"]["message"]
        (kept,) = (job for job in jobs.values() if job["status"] == "completed")
        path = "/v1/files/" + made.data[0].url.rpartition("/")[2]
        assert pixels(again.http.get(path).content).shape == (64, 64, 3) and kept["files"]
        with again.api() as api:
            assert api.images.generate(prompt=PROMPT).data


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = zoo.folder("ltx2", tmp_path_factory.getbasetemp())
    with served(folder, tmp_path_factory.mktemp("video"), "--served-model-name", "ltx-2") as server:
        yield server


def test_videos_with_sound_are_made_watched_listed_and_deleted(video: Served) -> None:
    with video.api(**SMALL) as api:
        body = {"num_inference_steps": 2, "num_frames": 9, "fps": 8.0}
        made = api.videos.create_and_poll(prompt="a red fox", model="ltx-2", size="64x64", extra_body=body)  # type: ignore[arg-type]
        assert made.status == "completed" and made.progress == 100, made
        content = api.videos.download_content(made.id).read()
        with av.open(io.BytesIO(content)) as container:
            assert len(container.streams.video) == len(container.streams.audio) == 1
            assert sum(1 for _ in container.decode(video=0)) == 9
        for variant in ("thumbnail", "spritesheet"):
            assert Image.open(io.BytesIO(api.videos.download_content(made.id, variant=variant).read())).format == "WEBP"  # type: ignore[arg-type]
        assert made.id in [one.id for one in api.videos.list()]
        assert api.videos.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            api.videos.retrieve(made.id)


def test_a_video_is_cancelled_while_it_is_made(video: Served) -> None:
    with video.api(**SMALL) as api:
        job = api.videos.create(
            prompt="a red fox", size="64x64", extra_body={"num_inference_steps": 1000, "num_frames": 9}
        )  # type: ignore[arg-type]
        seen = [0]
        deadline_s = time.monotonic() + 60
        while seen[-1] < 1:
            assert time.monotonic() < deadline_s
            found = api.videos.retrieve(job.id)
            assert found.status in ("queued", "in_progress") and found.progress >= seen[-1]
            seen.append(found.progress)
        assert api.videos.delete(job.id).deleted
        assert not any(group["num_orders"] for group in video.http.get("/health").json()["groups"])
        with pytest.raises(openai.NotFoundError):
            api.videos.retrieve(job.id)

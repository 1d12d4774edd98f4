"""Videos that go on from others, beyond what the official client asks (`test_client.py`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from penstock.server import remixes
from tests.server.engine_double import EngineDouble
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("remixes"), EngineDouble("video", accepts_image=True)) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


def made(http: httpx2.Client, **fields: Any) -> str:
    answer = http.post("/v1/videos", json={"prompt": "x", **fields})
    while http.get(f"/v1/videos/{answer.json()['id']}").json()["status"] != "completed":
        time.sleep(0.02)
    return str(answer.json()["id"])


def test_a_remix_has_the_settings_and_the_first_frame(
    live: Live, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = remixes.write_first_frame

    def seen(video: Any, picture: Any, most_pixels: int) -> None:
        real(video, picture, most_pixels)
        with Image.open(picture) as image:
            sizes.append(image.size)

    monkeypatch.setattr(remixes, "write_first_frame", seen)
    source = made(http, size="128x64", num_frames=9, seed=5, guidance_scale=2.0)
    answer = http.post(f"/v1/videos/{source}/remix", json={"prompt": "y"})
    assert answer.status_code == 200 and answer.json()["remixed_from_video_id"] == source
    request = live.engine.orders[-1].request
    assert (request.width, request.num_frames, request.seed, request.prompt) == (128, 9, 5, "y")
    assert request.arguments == {"guidance_scale": 2.0} and sizes == [(128, 64)]


def test_new_settings_take_the_place_of_those_that_say_the_same(live: Live, http: httpx2.Client) -> None:
    source = made(http, size="128x64", seconds="1", seed=5)
    for fields, expected in (
        ({"width": 64}, (64, 64, 9)),
        ({"size": "64x64", "num_frames": 5}, (64, 64, 5)),
        ({}, (128, 64, 9)),
    ):
        answer = http.post("/v1/videos/edits", json={"prompt": "y", "video": {"id": source}, **fields})
        assert answer.status_code == 200, answer.text
        request = live.engine.orders[-1].request
        assert (request.width, request.height, request.num_frames) == expected
    source = made(http, width=128, height=64, num_frames=5)
    body = {"prompt": "y", "video": {"id": source}, "size": "64x64", "seconds": "1"}
    assert http.post("/v1/videos/edits", json=body).status_code == 200
    assert live.engine.orders[-1].request.num_frames == 9


def test_a_frame_of_too_many_pixels_is_not_decoded(tmp_path: Path, http: httpx2.Client) -> None:
    content = http.get(f"/v1/videos/{made(http, size='128x128')}/content").content
    engine = EngineDouble("video", accepts_image=True)
    with serving(tmp_path, engine, max_pixels="64x64") as live, live.client() as small:
        answer = small.post("/v1/videos/edits", data={"prompt": "y"}, files={"video": ("a.mp4", content)})
    assert answer.status_code == 400 and "128x128 is more than 4096 pixels" in answer.json()["error"]["message"]


def test_an_edit_of_a_video_here(http: httpx2.Client) -> None:
    source = made(http, size="64x64")
    body = {"prompt": "y", "video": {"id": source}, "seed": 9}
    answer = http.post("/v1/videos/edits", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["remixed_from_video_id"], answer.json()["seed"]) == (source, 9)


def test_what_cannot_be_gone_on_from(live: Live, http: httpx2.Client) -> None:
    assert http.post("/v1/videos/video_0/remix", json={"prompt": "y"}).status_code == 404
    assert http.post("/v1/videos/edits", json={"prompt": "y", "video": {"id": "video_0"}}).status_code == 404
    for video in ("text", 5, {"url": "x"}, None):
        answer = http.post("/v1/videos/edits", json={"prompt": "y", "video": video})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "video"
    live.engine.gate.clear()
    try:
        source = http.post("/v1/videos", json={"prompt": "x"}).json()["id"]
        answer = http.post(f"/v1/videos/{source}/remix", json={"prompt": "y"})
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "not_completed"
        assert http.delete(f"/v1/videos/{source}").json()["deleted"]
    finally:
        live.engine.gate.set()


def test_a_remix_takes_a_prompt_and_nothing_else(http: httpx2.Client) -> None:
    answer = http.post("/v1/videos/video_0/remix", json={"prompt": "y", "size": "64x64"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"


def test_a_video_whose_file_has_gone(live: Live, http: httpx2.Client) -> None:
    source = made(http)
    job = http.get(f"/v1/jobs/{source}").json()
    for path in (live.spool.parent / "files").iterdir():
        if path.name in {file["name"] for file in job["files"]}:
            path.unlink()
    assert http.post(f"/v1/videos/{source}/remix", json={"prompt": "y"}).status_code == 404
    assert http.get(f"/v1/videos/{source}/content").status_code == 404

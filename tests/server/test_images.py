"""The routes of pictures beyond what the official client asks (`test_client.py`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from penstock.server.files import StorageError
from tests.server.engine_double import EngineDouble
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("images")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


def test_a_picture_is_a_job_as_well(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "x", "seed": 1, "user": "ann"})
    job_id = answer.headers["x-penstock-job-id"]
    job = http.get(f"/v1/jobs/{job_id}").json()
    assert answer.json()["job_id"] == job_id and job["status"] == "completed"
    assert job["arguments"] == {"prompt": "x", "seed": 1}
    content = http.get(job["files"][0]["url"]).content
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == content


def test_a_form_is_taken_as_well(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", files={"prompt": (None, "x"), "n": (None, "2"), "seed": (None, "5")})
    assert [item["seed"] for item in answer.json()["data"]] == [5, 6]


def test_null_is_left_out(http: httpx2.Client) -> None:
    body = {"prompt": "x", "n": None, "quality": None, "guidance_scale": None, "stream": None}
    assert http.post("/v1/images/generations", json=body).status_code == 200


def test_events_on_the_wire(http: httpx2.Client) -> None:
    body = {"prompt": "x", "stream": True, "partial_images": 1, "output_format": "webp"}
    answer = http.post("/v1/images/generations", json=body)
    assert (
        answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-cache"
    )
    blocks = [block for block in answer.text.split("\n\n") if block.startswith("event:")]
    name, data = blocks[-1].split("\n")
    done = json.loads(data.removeprefix("data: "))
    assert name == "event: image_generation.completed" and done["type"] == "image_generation.completed"
    assert done["output_format"] == "webp" and done["job_id"] == answer.headers["x-penstock-job-id"]
    assert base64.b64decode(done["b64_json"])[8:12] == b"WEBP"


def test_a_model_of_videos_makes_no_pictures(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble("video")) as live, live.client() as http:
        for path in ("generations", "edits", "variations"):
            answer = http.post(f"/v1/images/{path}", json={"prompt": "x"})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_by_model"
            assert "/v1/videos" in answer.json()["error"]["message"]


def test_an_answer_has_all_that_clients_look_for(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "x"}).json()
    assert {"created", "data", "size", "output_format", "quality", "background", "usage"} <= answer.keys()
    assert answer["quality"] is None and "url" not in answer["data"][0]


def test_a_detached_request_is_answered_with_its_job_and_goes_on(tmp_path: Path) -> None:
    engine = EngineDouble()
    engine.gate.clear()
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x", "detach": True, "partial_images": 1})
        job = answer.json()
        assert answer.status_code == 202 and job["object"] == "job" and job["status"] in ("queued", "in_progress")
        assert answer.headers["x-penstock-job-id"] == job["id"] and "detach" not in job["arguments"]
        engine.gate.set()
        text = http.get(f"/v1/jobs/{job['id']}/events").text
        assert "event: partial_image" in text and "event: completed" in text
        refused = http.post("/v1/images/generations", json={"prompt": "x", "detach": True, "stream": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "detach")


@pytest.mark.parametrize("streams", [False, True])
def test_a_picture_that_cannot_be_kept_is_handed_out(
    streams: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(path: Path, media_type: str) -> str:
        raise StorageError("no space left")

    with serving(tmp_path) as live, live.client() as http:
        monkeypatch.setattr(live.files, "put", full)
        body = {"prompt": "x", "n": 2, "seed": 4}
        answer = http.post("/v1/images/generations", json={**body, "stream": streams})
        assert answer.status_code == 200
        if streams:
            assert answer.text.count("event: image_generation.completed") == 2 and '"b64_json"' in answer.text
            assert "event: error" not in answer.text
        else:
            assert [one["seed"] for one in answer.json()["data"]] == [4, 5]
            assert base64.b64decode(answer.json()["data"][1]["b64_json"]).startswith(b"\x89PNG")
        by_url = http.post("/v1/images/generations", json={**body, "response_format": "url"})
        assert (by_url.status_code, by_url.headers["x-should-retry"]) == (503, "false")
        jobs = http.get("/v1/jobs").json()["data"]
        assert [job["error"]["code"] for job in jobs] == ["storage_failed"] * 2

"""The routes of videos beyond what the official client asks (`test_client.py`)."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
import httpx2
import pytest

from tests.server.engine_double import EngineDouble
from tests.server.live import Live, serving

KEYS = {
    *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt"),
    *("seconds", "size", "remixed_from_video_id", "error"),
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("videos"), EngineDouble("video")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


def done(http: httpx2.Client, video_id: str) -> dict[str, Any]:
    while True:
        answer = http.get(f"/v1/videos/{video_id}")
        if answer.json()["status"] in ("completed", "failed"):
            return dict(answer.json())
        assert 100 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
        time.sleep(0.02)


@pytest.mark.parametrize("seconds", ["1", 1])
def test_json_and_a_form_mean_the_same(live: Live, http: httpx2.Client, seconds: Any) -> None:
    fields = {"prompt": "x", "seconds": seconds, "size": "64x48", "seed": 3, "fps": 8}
    by_json = http.post("/v1/videos", json=fields)
    by_form = http.post("/v1/videos", files={name: (None, str(value)) for name, value in fields.items()})
    for answer in (by_json, by_form):
        assert answer.status_code == 200 and answer.json().keys() >= KEYS
        video = done(http, answer.json()["id"])
        assert (video["size"], video["seconds"], video["num_frames"], video["seed"]) == ("64x48", "1.1", 9, 3)
    one, other = (order.request for order in live.engine.orders[-2:])
    assert one == other


def test_sync_answers_with_the_video(http: httpx2.Client) -> None:
    answer = http.post("/v1/videos/sync", json={"prompt": "x", "num_frames": 5})
    assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as container:
        assert container.streams.video[0].frames == 5
    assert http.get(f"/v1/videos/{answer.headers['x-penstock-job-id']}").json()["status"] == "completed"


def test_sync_that_nobody_waits_for_is_cancelled(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    try:
        with pytest.raises(httpx2.ReadTimeout):
            http.post("/v1/videos/sync", json={"prompt": "alone"}, timeout=1.5)
        newest = http.get("/v1/videos", params={"limit": 1}).json()["data"][0]
        assert newest["prompt"] == "alone" and done(http, newest["id"])["error"]["code"] == "cancelled"
    finally:
        live.engine.gate.set()


def test_progress_and_place_while_it_waits(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    try:
        first, second = (http.post("/v1/videos", json={"prompt": name}).json()["id"] for name in ("first", "second"))
        while http.get(f"/v1/videos/{first}").json()["status"] == "queued":
            time.sleep(0.01)
        waiting = http.get(f"/v1/videos/{second}").json()
        assert waiting["status"] == "queued" and waiting["queue_position"] == 0
        assert waiting["estimated_start_s"] == 0.0
    finally:
        live.engine.gate.set()
    assert done(http, first)["progress"] == done(http, second)["progress"] == 100


def test_parts_of_the_content(http: httpx2.Client) -> None:
    video_id = http.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    done(http, video_id)
    whole = http.get(f"/v1/videos/{video_id}/content")
    part = http.get(f"/v1/videos/{video_id}/content", headers={"range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == whole.content[4:8] == b"ftyp"
    tag = {"if-none-match": whole.headers["etag"]}
    assert http.get(f"/v1/videos/{video_id}/content", headers=tag).status_code == 304
    wrong = http.get(f"/v1/videos/{video_id}/content", params={"variant": "gif"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "variant"


@pytest.mark.parametrize(
    ("params", "param"), [({"limit": 0}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order")]
)
def test_wrong_questions_for_a_list(http: httpx2.Client, params: dict[str, Any], param: str) -> None:
    answer = http.get("/v1/videos", params=params)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_two_who_delete_the_same(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    video_id = http.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    answers: list[int] = []

    def delete() -> None:
        with live.client() as other:
            answers.append(other.delete(f"/v1/videos/{video_id}").status_code)

    threads = [threading.Thread(target=delete) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    live.engine.gate.set()
    assert set(answers) <= {200, 404} and 200 in answers
    assert http.get(f"/v1/videos/{video_id}").status_code == 404

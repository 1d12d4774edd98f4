"""Jobs of whichever kind over HTTP."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from penstock.wire import Failure
from tests.server.browser import Turnstile
from tests.server.engine_double import EngineDouble
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("listing"), EngineDouble("video")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


Hear = Callable[[str, dict[str, Any]], None]


def events(http: httpx2.Client, job_id: str, hear: Hear = lambda name, data: None) -> list[tuple[str, dict[str, Any]]]:
    """All events of a job; each is heard as it comes."""
    found: list[tuple[str, dict[str, Any]]] = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
                hear(*found[-1])
    return found


def test_events_tell_the_real_steps(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    job_id = http.post("/v1/videos", json={"prompt": "x", "num_inference_steps": 6}).json()["id"]
    found = events(http, job_id, lambda name, data: live.engine.gate.set())
    steps = [data for name, data in found if name == "progress" and data["stage"] == "denoise" and data["step"]]
    assert [data["step"] for data in steps] == [1, 2, 3, 4, 5, 6] and {data["total"] for data in steps} == {6}
    progress = [data["progress"] for data in steps]
    assert progress == [16, 33, 50, 66, 83, 99]
    assert all(data["seconds"] >= 0 and data["job_id"] == job_id for data in steps)
    assert [name for name, _ in found][-1] == "completed"
    job = found[-1][1]["job"]
    assert job["progress"] == 100 and job["files"][0]["url"].startswith(live.url)
    assert [name for name, _ in events(http, job_id)] == ["completed"]  # and again, for whoever comes late


def test_a_queued_job_tells_its_place(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    first, second = (http.post("/v1/videos", json={"prompt": name}).json()["id"] for name in ("1", "2"))
    while http.get(f"/v1/jobs/{first}").json()["status"] == "queued":
        time.sleep(0.01)
    name, data = events(http, second, lambda name, data: live.engine.gate.set())[0]
    assert name == "queued" and data["position"] == 0 and data["estimated_start_s"] == 0.0


def test_a_queued_job_tells_of_every_place(live: Live, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.listing.PLACE_S", 0.02)
    live.engine.gate.clear()
    made = [http.post("/v1/videos", json={"prompt": str(number)}).json()["id"] for number in range(2)]
    before = [2]
    monkeypatch.setattr(live.engine, "position", lambda order_id: (before[0], 1.0))

    def hear(name: str, data: dict[str, Any]) -> None:
        if data.get("position") == 0:
            live.engine.gate.set()
        before[0] -= before[0] > 0

    found = events(http, made[1], hear)
    assert [data["position"] for name, data in found if name == "queued"] == [2, 1, 0]


def test_a_failed_job_ends_with_why(live: Live, http: httpx2.Client) -> None:
    live.engine.failures["boom"] = Failure(code="out_of_memory", message="it does not fit. Ask for less.")
    job_id = http.post("/v1/videos", json={"prompt": "boom"}).json()["id"]
    name, data = events(http, job_id)[-1]
    assert name == "failed" and data["job"]["error"]["code"] == "out_of_memory"


def test_partial_pictures_are_told_to_those_who_follow(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("partials")) as live, live.client() as http:
        gate = live.engine.gate = Turnstile()
        answers = []

        def ask() -> None:
            with live.client() as other:
                body = {"prompt": "x", "stream": True, "partial_images": 2}
                answers.append(other.post("/v1/images/generations", json=body).text)

        thread = threading.Thread(target=ask)
        thread.start()
        while not (data := http.get("/v1/jobs").json()["data"]):
            time.sleep(0.01)
        gate.let(2)  # each makes one; the run ends, and takes them along, once both are seen
        found = events(http, data[0]["id"], lambda name, data: data.get("partial_image_index") == 1 and gate.set())
        thread.join(20)
    partials = [data for name, data in found if name == "partial_image"]
    assert [(data["item"], data["partial_image_index"]) for data in partials] == [(0, 0), (0, 1)]
    assert base64.b64decode(partials[0]["b64_json"]).startswith(b"\x89PNG")


def test_list_and_delete(live: Live, http: httpx2.Client) -> None:
    made = [http.post("/v1/videos", json={"prompt": str(number)}).json()["id"] for number in range(3)]
    page = http.get("/v1/jobs", params={"limit": 2, "kind": "video"}).json()
    assert [job["id"] for job in page["data"]] == made[:0:-1] and page["has_more"]
    assert page["first_id"] == made[2] and page["last_id"] == made[1]
    assert http.get("/v1/jobs", params={"kind": "image"}).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }
    answer = http.delete(f"/v1/jobs/{made[0]}")
    assert answer.json() == {"id": made[0], "object": "job.deleted", "deleted": True}
    for path in (f"/v1/jobs/{made[0]}", f"/v1/jobs/{made[0]}/events", f"/v1/videos/{made[0]}"):
        assert http.get(path).status_code == 404


def await_that(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_events_end_for_a_listener_who_leaves(live: Live, http: httpx2.Client) -> None:
    live.engine.gate.clear()
    try:
        job_id = http.post("/v1/videos", json={"prompt": "x"}).json()["id"]
        run = live.app.state.service.jobs.run_of(job_id)
        with live.client() as other, other.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            texts = answer.iter_text()  # held: it ends the stream where it goes
            next(texts)
            await_that(lambda: bool(run._feeds))
        await_that(lambda: not run._feeds)
        assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "in_progress"  # to look away cancels nothing
    finally:
        live.engine.gate.set()

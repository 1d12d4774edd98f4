"""One line and one count for each answer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from penstock.server.access import route_of
from penstock.server.jobs import Jobs
from penstock.server.logs import logging_to
from penstock.wire import Failure
from tests.server.engine_double import EngineDouble
from tests.server.live import serving


def test_a_request_is_told_of_once_and_without_its_key(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(stream, log_format="json"), serving(tmp_path, EngineDouble(), api_key=["sk-ann"]) as live:
        with live.client("sk-ann") as http:
            body = {"prompt": "a secret prompt", "user": "user-7", "seed": 3}
            made = http.post("/v1/images/generations", json=body)
            wrong = http.post("/v1/images/generations?key=sk-query", json={"prompt": "x", "size": "65x64"})
            http.get("/health")
        with live.client("sk-eve") as http:
            assert http.get("/v1/jobs").status_code == 401
    text = stream.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    (job,) = [line for line in lines if line["event"] == "job"]
    assert job["job"] == made.json()["job_id"] and job["status"] == "completed" and job["user"] == "user-7"
    assert {"queue_s", "encode_s", "denoise_s", "decode_s", "save_s", "total_s", "size", "seed"} <= job.keys()
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [400, 401]  # what became a job is told of by its job
    assert requests[0]["request"] == wrong.headers["x-request-id"] and requests[0]["owner"] == job["owner"]
    for secret in ("sk-ann", "sk-eve", "sk-query", "a secret prompt"):
        assert secret not in text


def test_methods_are_few_words(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        for method in ("BREW", "X" * 50):
            assert http.request(method, "/health").status_code == 405
        text = http.get("/metrics").text
    assert 'method="other",route="/health",status="405"} 2.0' in text and "BREW" not in text


def test_a_defect_is_counted_and_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Jobs, *arguments: object, **more: object) -> None:
        raise ZeroDivisionError

    stream = io.StringIO()
    monkeypatch.setattr(Jobs, "get", broken)
    with logging_to(stream, log_format="json"), serving(tmp_path) as live, live.client() as http:
        answer = http.get("/v1/jobs/image_1")
        text = http.get("/metrics").text
    assert 'method="GET",route="/v1/jobs/{job_id}",status="500"} 1.0' in text
    (line,) = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == "request"]
    assert line["status"] == 500 and line["request"] == answer.headers["x-request-id"]


def test_routes_are_few_words() -> None:
    assert route_of({}) == "none"


def test_a_failed_job_says_why_in_its_line(tmp_path: Path) -> None:
    stream, engine = io.StringIO(), EngineDouble()
    engine.failures["boom"] = Failure(code="out_of_memory", message="it does not fit. Ask for less.")
    with logging_to(stream, log_format="json"), serving(tmp_path, engine) as live, live.client() as http:
        http.post("/v1/images/generations", json={"prompt": "boom"})
    (job,) = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == "job"]
    assert job["code"] == "out_of_memory" and "does not fit" in job["error"]

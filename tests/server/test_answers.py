"""From a job to what a client is shown of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from penstock.server.answers import job_answer, poll_ms, url_of, video_answer
from tests.server.jobs import a_file, a_job


def jobs(position: tuple[int, float] | None = None) -> Any:
    return SimpleNamespace(position=lambda job: position if job.status == "queued" else None)


def request(host: str = "penstock.example:8000") -> Request:
    scope = {"type": "http", "scheme": "http", "path": "/v1/jobs", "query_string": b"", "server": ("127.0.0.1", 8000)}
    return Request({**scope, "headers": [(b"host", host.encode())], "method": "GET"})


def test_every_key_of_a_video_is_there() -> None:
    answer = video_answer(a_job(kind="video", prompt="x"), jobs((2, 7.5))).model_dump()
    assert answer["completed_at"] is None and answer["error"] is None and answer["remixed_from_video_id"] is None
    assert (answer["seconds"], answer["size"], answer["status"], answer["progress"]) == ("0", "auto", "queued", 0)
    assert (answer["queue_position"], answer["estimated_start_s"]) == (2, 7.5)


def test_real_frames_and_failures() -> None:
    file = a_file("0.mp4", facts={"num_frames": 33, "frame_rate": 8.0})
    done = video_answer(a_job(kind="video", status="completed", completed_at=5, files=(file,)), jobs())
    assert (done.num_frames, done.frame_rate, done.completed_at) == (33, 8.0, 5)
    failed = video_answer(a_job(kind="video", status="failed", completed_at=5, error_code="rank_died"), jobs())
    assert failed.completed_at is None and failed.error is not None and failed.error.code == "rank_died"


def test_files_are_where_this_client_reaches_the_server() -> None:
    file = a_file("0" * 32 + ".png", seed=3)
    answer = job_answer(a_job(status="completed", files=(file,)), jobs(), request())
    assert answer.files[0].url == "http://penstock.example:8000/v1/files/" + file.name
    assert url_of(request("[::1]:9"), file) == "http://[::1]:9/v1/files/" + file.name


@pytest.mark.parametrize(
    ("position", "least", "most"), [(None, 250, 250), ((0, 0.0), 250, 250), ((3, 3600.0), 5000, 5000)]
)
def test_pace_of_polling(position: tuple[int, float] | None, least: int, most: int) -> None:
    assert least <= poll_ms(a_job(), jobs(position)) <= most

"""What the record of a job says once it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from penstock.request import GenerationRequest
from penstock.server.endings import FIELDS, WORDS, ending, failure_of
from penstock.server.job import Job
from penstock.server.runs import Run
from penstock.wire import Ended, Failure, MadeFile, Order, Timings
from tests.server.jobs import a_file, a_job


def of_run(values: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        job = a_job(kind="video", size="auto", seconds="4")
        return values(Run(job, Order(id=job.id, request=GenerationRequest(seed=0), folder="/nowhere")))

    return asyncio.run(main())


def test_what_was_made_is_told_as_it_came_out() -> None:
    def values(run: Run) -> dict[str, Any]:
        facts: dict[str, Any] = {"width": 64, "height": 48, "num_frames": 33, "frame_rate": 8.0}
        run.made.append(MadeFile(item=0, path="a", kind="video", media_type="video/mp4", num_bytes=1, seed=0, **facts))
        run.kept = [a_file("2", item=1), a_file("1", role="thumbnail"), a_file("0")]
        return ending(run, None, Ended(id="x", timings=Timings(total_s=1.23456)), 60)

    done = of_run(values)
    assert (done["status"], done["progress"], done["size"], done["seconds"]) == ("completed", 100, "64x48", "4.1")
    assert [file.name for file in done["files"]] == ["0", "1", "2"]
    assert done["expires_at"] - done["completed_at"] == 60 and done["timings"]["total_s"] == 1.2346


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        ("cancelled", "client_left", "cancelled"),
        ("cancelled", "deleted", "cancelled"),
        ("cancelled", "server_stopped", "server_stopped"),
        ("engine_closed", "server_stopped", "server_stopped"),
        ("engine_closed", "", "engine_closed"),
        ("rank_died", "deleted", "rank_died"),
    ],
)
def test_why_it_was_not_made(code: str, reason: str, said: str) -> None:
    def values(run: Run) -> dict[str, Any]:
        run.cancel_reason = reason
        run.kept = [a_file("0")]
        return ending(run, Failure(code=code, message="the rank's words."), Ended(id="x"), 60)

    failed = of_run(values)
    assert (failed["status"], failed["error_code"], failed["files"]) == ("failed", said, ())
    assert failed["error_message"] == (
        WORDS[reason] if said != code or code == "cancelled" or reason == said else "the rank's words."
    )
    assert "progress" not in failed


def test_what_a_rank_wrote_last_is_not_for_clients() -> None:
    def values(run: Run) -> dict[str, Any]:
        failure = Failure(code="rank_died", message="rank 0 died (exit 1): /home/ann/model is broken. Ask again.")
        return ending(run, failure, Ended(id="x"), 60)

    assert of_run(values)["error_message"] == "rank 0 died (exit 1). Ask again."


def test_fields_are_those_of_a_job() -> None:
    assert set(FIELDS) <= set(Job.__dataclass_fields__)


def test_whoever_waited_hears_why() -> None:
    error = failure_of(a_job(status="failed", error_code="out_of_memory", error_message="too large."))
    assert (error.status, error.message) == (507, "too large.")

"""How a job ends: what its record says from then on, and what whoever waited for it is answered.

Owns those words and values. Does not know how they are written down.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec.structs import asdict as fields_of

from penstock.server.failures import ApiError, how_it_died, in_fields, of_failure
from penstock.server.job import Job
from penstock.server.pipeline import seconds_of
from penstock.server.runs import Run
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from penstock.wire import Ended, Failure, MadeFile

WORDS = {
    "client_left": "the client left before it was made, so it was cancelled. Ask again.",
    "stopped": "it was cancelled before all of it was made. What was finished stays.",
    "deleted": "it was deleted before it was made.",
    "server_stopped": "the server was stopped before it was made. Ask again once it runs.",
}
"""Reason of a cancel: what the job's record says."""

FIELDS = (
    *("status", "progress", "started_at", "completed_at", "expires_at", "timings", "files"),
    *("error_code", "error_message", "size", "seconds"),
)
"""The fields of a job that its end may change."""


def ending(run: Run, failure: Failure | None, ended: Ended, ttl_s: int) -> dict[str, Any]:
    """What the last event changes of a job.

    Args:
        run: with the files that were kept.
        failure: why it has no result; None where it has.
        ended: the event.
        ttl_s: seconds until the job expires.

    Returns:
        Field of the job to its value.
    """
    now = int(time.time())
    timings = {name: round(value, 4) for name, value in fields_of(ended.timings).items()}
    values: dict[str, Any] = {"completed_at": now, "expires_at": now + ttl_s, "timings": timings}
    files = tuple(sorted(run.kept, key=lambda file: (file.item, file.role)))
    if failure is None:
        return {**values, **_real(run.made[0]), "status": "completed", "progress": 100, "files": files}
    code, message = failure.code, in_fields(failure.message)
    if code in ("cancelled", "engine_closed") and run.cancel_reason:
        code = "server_stopped" if run.cancel_reason == "server_stopped" else "cancelled"
        message = WORDS[run.cancel_reason]
    if died := how_it_died(message):
        message = f"{died}. Ask again."
    if code != "cancelled" or run.cancel_reason != "stopped":
        files = ()
    return {**values, "status": "failed", "error_code": code, "error_message": message, "files": files}


def _real(made: MadeFile) -> dict[str, str]:
    """Size and duration as they came out."""
    real = {"size": f"{made.width}x{made.height}"} if made.width and made.height else {}
    if made.num_frames and made.frame_rate:
        real["seconds"] = seconds_of(made.num_frames, made.frame_rate)
    return real


def fail_lost(store: Store, settings: ServeConfig) -> int:
    """Fail what an earlier server of this name was at when it ended; how many jobs that were.

    Raises:
        ConfigError: where another server of this name is running.
        StoreError: where the database fails.
    """
    message = "the server ended while it was made, and was started again. Ask again."
    return store.fail_unfinished("server_restarted", message, expires_at=int(time.time()) + settings.ttl_s)


def fail_dead(store: Store, settings: ServeConfig) -> int:
    """Fail what other servers of this database were at that are no more; how many jobs that were.

    Raises:
        StoreError: where the database fails.
    """
    message = "the server that was at it has ended. Ask again."
    return store.fail_dead("server_died", message, expires_at=int(time.time()) + settings.ttl_s)


def failure_of(job: Job) -> ApiError:
    """What to answer to a request that waited for a job which failed."""
    return of_failure(Failure(code=job.error_code or "generation_failed", message=job.error_message or "it failed."))

"""Jobs for the tests of what keeps them."""

from __future__ import annotations

from typing import Any

from penstock.server.job import Job, JobFile, new_id


def a_job(**values: Any) -> Job:
    """A queued job, of the owner `ann` where nothing else is said."""
    kind = values.pop("kind", "image")
    given = {"id": new_id(kind), "owner": "ann", "server": "alpha", "model": "demo", "created_at": 1000, **values}
    return Job(kind=kind, **given)


def a_file(name: str, num_bytes: int = 10, **values: Any) -> JobFile:
    """A picture of a job."""
    return JobFile(name=name, num_bytes=num_bytes, **{"role": "result", "media_type": "image/png", **values})

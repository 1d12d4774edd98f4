"""From a job to what a client is shown of it.

Owns that mapping, and the URLs of files. Does not know how a job is made, or routes other than that of files.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request

from penstock.server.job import Job, JobFile
from penstock.server.jobs import Jobs
from penstock.server.runs import Run
from penstock.server.schemas import FileAnswer, ImageItem, ImagesAnswer, JobAnswer, JobError, VideoAnswer

FILES = "/v1/files/"
"""Where files are, by their names."""

_LEAST_POLL_MS = 250
_MOST_POLL_MS = 5000


def url_of(request: Request, file: JobFile) -> str:
    """The address of a file, as this client reaches the server."""
    return str(request.base_url).rstrip("/") + FILES + file.name


def video_answer(job: Job, jobs: Jobs) -> VideoAnswer:
    """A video job as OpenAI's clients know it."""
    facts = next((file.facts for file in job.results()), {})
    position, wait_s = jobs.position(job) or (None, None)
    return VideoAnswer(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=job.created_at,
        completed_at=job.completed_at if job.status == "completed" else None,
        expires_at=job.expires_at,
        prompt=job.prompt or None,
        seconds=job.seconds or "0",
        size=job.size or "auto",
        remixed_from_video_id=job.remixed_from,
        error=_error(job),
        seed=job.seed,
        num_frames=facts.get("num_frames"),
        frame_rate=facts.get("frame_rate"),
        queue_position=position,
        estimated_start_s=wait_s,
    )


def job_answer(job: Job, jobs: Jobs, request: Request) -> JobAnswer:
    """A job with all that is known of it."""
    position, wait_s = jobs.position(job) or (None, None)
    return JobAnswer(
        id=job.id,
        kind=job.kind,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        expires_at=job.expires_at,
        prompt=job.prompt or None,
        seconds=job.seconds,
        size=job.size,
        seed=job.seed,
        arguments=job.arguments,
        remixed_from=job.remixed_from,
        error=_error(job),
        files=[_file(file, request) for file in job.files],
        timings=job.timings,
        queue_position=position,
        estimated_start_s=wait_s,
    )


def images_answer(run: Run, request: Request, *, as_url: bool) -> ImagesAnswer:
    """The pictures of a finished run, by their addresses, or as they are: those need not have been kept."""
    job = run.job
    if as_url:
        items = [ImageItem(url=url_of(request, file), seed=file.seed) for file in job.results()]
    else:
        contents = sorted(run.contents.items())
        items = [ImageItem(b64_json=content, seed=(job.seed or 0) + item) for item, content in contents]
    return ImagesAnswer(
        created=job.created_at,
        data=items,
        size=job.size or "auto",
        output_format=format_of(run),
        job_id=job.id,
        timings=job.timings,
    )


def format_of(run: Run) -> Any:
    """The format of a run's pictures."""
    return run.order.format.name or "png"


def poll_ms(job: Job, jobs: Jobs) -> int:
    """After how many milliseconds it is worth to look at an unfinished job again."""
    position = jobs.position(job)
    wait_ms = 500 * position[1] if position else _LEAST_POLL_MS
    return int(min(max(wait_ms, _LEAST_POLL_MS), _MOST_POLL_MS))


def _error(job: Job) -> JobError | None:
    if job.error_code is None:
        return None
    return JobError(code=job.error_code, message=job.error_message or "")


def _file(file: JobFile, request: Request) -> FileAnswer:
    return FileAnswer(
        name=file.name,
        url=url_of(request, file),
        role=file.role,  # type: ignore[arg-type]
        media_type=file.media_type,
        num_bytes=file.num_bytes,
        item=file.item,
        seed=file.seed,
        facts=file.facts,
    )

"""Jobs of whichever kind over HTTP: listed, looked at, followed, cancelled, deleted.

Owns the routes of `/v1/jobs`. Does not know how a job is made.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from penstock.server.answers import job_answer
from penstock.server.events import Event, stream
from penstock.server.job import Job
from penstock.server.openapi import STREAM, errors
from penstock.server.runs import Feed, News, Run
from penstock.server.schemas import Deleted, JobAnswer, JobPage
from penstock.server.service import owner_of, service_of
from penstock.server.threads import CODING
from penstock.server.videos import After, Limit

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

PLACE_S = 1.0  # between two looks at the place of a job that waits

Kind = Annotated[Literal["image", "video"] | None, Query(description="Only these.")]


@router.get("", response_model=JobPage, responses=errors(400, 404, 503))
async def list_jobs(
    request: Request,
    limit: Limit = 20,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
    kind: Kind = None,
) -> JobPage:
    """The client's jobs, newest first."""
    jobs = service_of(request).jobs
    found, has_more = await jobs.list(owner_of(request), kind, limit=limit, after=after, order=order)
    data = [job_answer(job, jobs, request) for job in found]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return JobPage(data=data, has_more=has_more, first_id=ends[0], last_id=ends[1])


@router.get("/{job_id}", response_model=JobAnswer, responses=errors(404, 503))
async def retrieve(request: Request, job_id: str) -> JobAnswer:
    """A job as it is now."""
    jobs = service_of(request).jobs
    return job_answer(await jobs.get(job_id, owner_of(request)), jobs, request)


@router.delete("/{job_id}", response_model=Deleted, responses=errors(404, 409, 503))
async def delete(request: Request, job_id: str) -> Deleted:
    """Cancel a job where it is unfinished, wait until its ranks have let go, and remove its files and its record."""
    jobs = service_of(request).jobs
    await jobs.delete(await jobs.get(job_id, owner_of(request)))
    return Deleted(id=job_id, object="job.deleted")


@router.post("/{job_id}/cancel", response_model=JobAnswer, responses=errors(404, 409, 503))
async def cancel(request: Request, job_id: str) -> JobAnswer:
    """Cancel a job where it is unfinished, and wait until its ranks have let go; what is finished of it stays."""
    jobs = service_of(request).jobs
    job = await jobs.end(await jobs.get(job_id, owner_of(request)), "stopped")
    return job_answer(job, jobs, request)


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={200: {"description": "Events until the job is over.", "content": STREAM}, **errors(404, 503)},
)
async def events(request: Request, job_id: str) -> Response:
    """What happens to a job, as server-sent events: queued, progress, partial_image; at last completed or failed."""
    jobs = service_of(request).jobs
    job = await jobs.get(job_id, owner_of(request))
    return stream(_events(request, job, jobs.run_of(job.id)), request)


async def _events(request: Request, job: Job, run: Run | None) -> AsyncIterator[Event]:
    jobs = service_of(request).jobs
    if run is not None:
        with run.listening() as feed:
            async for news in _with_places(feed, request, run):
                event = await _event(news, request, run)
                if event is not None:
                    yield event
        job = run.job
    name = job.status if job.status in ("completed", "failed") else "progress"  # unfinished: another server's
    yield name, {"type": name, "job": job_answer(job, jobs, request).model_dump()}


async def _with_places(feed: Feed, request: Request, run: Run) -> AsyncIterator[News]:
    """The news of a feed; between them, as long as the run waits, its place where that has changed."""
    jobs, told = service_of(request).jobs, service_of(request).jobs.position(run.job)
    while True:
        try:
            async with asyncio.timeout(PLACE_S if told is not None else None):
                news = await feed.get()
        except TimeoutError:
            now = jobs.position(run.job)
            if now is not None and now[0] != (told or (None,))[0]:
                yield run.waiting()
            told = now
            continue
        if news["type"] == "ended":
            return
        told = jobs.position(run.job)
        yield news


async def _event(news: News, request: Request, run: Run) -> Event | None:
    if news["type"] == "progress":
        position = service_of(request).jobs.position(run.job)
        if news["stage"] != "queue":
            return "progress", {**news, "job_id": run.job.id}
        waits: dict[str, Any] = {"position": None, "estimated_start_s": None}
        if position is not None:
            waits = {"position": position[0], "estimated_start_s": position[1]}
        return "queued", {"type": "queued", "job_id": run.job.id, "seconds": news["seconds"], **waits}
    if news["type"] == "partial_image":
        content = await CODING.run(_content, Path(news["path"]))
        if content is not None:
            where = {"item": news["item"], "partial_image_index": news["index"]}
            facts = {"output_format": run.order.format.name or "png", "job_id": run.job.id}
            return "partial_image", {"type": "partial_image", **where, "b64_json": content, **facts}
    return None


def _content(path: Path) -> str | None:
    try:
        return base64.b64encode(path.read_bytes()).decode("ascii")
    except FileNotFoundError:  # the run is over, and has taken it along
        return None

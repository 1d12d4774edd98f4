"""Videos over HTTP: asked for, followed, fetched, deleted.

Owns the routes of `/v1/videos`. Does not know how a request is checked or run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from penstock.server.answers import poll_ms, video_answer
from penstock.server.bodies import FORM, JSON, reading
from penstock.server.contents import deliver
from penstock.server.endings import failure_of
from penstock.server.events import unless_left
from penstock.server.failures import ApiError
from penstock.server.images import CLIENT_LEFT
from penstock.server.job import UNFINISHED, Job
from penstock.server.making import admit, begin
from penstock.server.openapi import JOB_ID, binary, errors
from penstock.server.pictures import Taken
from penstock.server.schemas import Deleted, VideoAnswer, VideoAsk, VideoPage
from penstock.server.service import Service, owner_of, service_of

router = APIRouter(prefix="/v1/videos", tags=["videos"])

MOST_LISTED = 100
TAKEN = Taken(fields={"input_reference": "image"})
_MADE = errors(400, 404, 408, 409, 413, 415, 429, 503, 507)

After = Annotated[str | None, Query(max_length=100, description="Id of the last one of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="Most of a page.")]
Variant = Literal["video", "thumbnail", "spritesheet"]


@router.post("", response_model=VideoAnswer, responses=_MADE)
async def create(request: Request, response: Response) -> VideoAnswer:
    """Ask for a video; it is made while the client looks at its job from time to time."""
    admit(request, "video")
    async with reading(request, FORM, JSON) as body:
        run = await begin(request, VideoAsk, body, TAKEN, kind="video")
    jobs = service_of(request).jobs
    response.headers["x-penstock-job-id"] = run.job.id
    response.headers["openai-poll-after-ms"] = str(poll_ms(run.job, jobs))
    return video_answer(run.job, jobs)


@router.post(
    "/sync",
    response_class=Response,
    responses={
        200: {"description": "The video.", "content": binary("video/mp4"), "headers": JOB_ID},
        206: {"description": "A part of it.", "content": binary("video/mp4")},
        **_MADE,
        **errors(500),
    },
)
async def create_and_wait(request: Request) -> Response:
    """Make a video and answer with its bytes; it is cancelled where the client leaves."""
    admit(request, "video")
    service = service_of(request)
    async with reading(request, FORM, JSON) as body:
        run = await begin(request, VideoAsk, body, TAKEN, kind="video")
    if await unless_left(request, run.is_over.wait()) is None:
        service.jobs.cancel(run, "client_left")
        return Response(status_code=CLIENT_LEFT)
    if run.job.status == "failed":
        error = failure_of(run.job)
        error.headers["x-penstock-job-id"] = run.job.id
        raise error
    answer = await _content(request, service, run.job, "video")
    answer.headers["x-penstock-job-id"] = run.job.id
    return answer


@router.get("", response_model=VideoPage, responses=errors(400, 404, 503))
async def list_videos(
    request: Request, limit: Limit = 20, after: After = None, order: Literal["asc", "desc"] = "desc"
) -> VideoPage:
    """The client's videos, newest first."""
    jobs = service_of(request).jobs
    found, has_more = await jobs.list(owner_of(request), "video", limit=limit, after=after, order=order)
    data = [video_answer(job, jobs) for job in found]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return VideoPage(data=data, has_more=has_more, first_id=ends[0], last_id=ends[1])


@router.get("/{video_id}", response_model=VideoAnswer, responses=errors(404, 503))
async def retrieve(request: Request, response: Response, video_id: str) -> VideoAnswer:
    """A video's job as it is now."""
    jobs = service_of(request).jobs
    job = await jobs.get(video_id, owner_of(request), "video")
    if job.status in UNFINISHED:
        response.headers["openai-poll-after-ms"] = str(poll_ms(job, jobs))
    return video_answer(job, jobs)


@router.delete("/{video_id}", response_model=Deleted, responses=errors(404, 409, 503))
async def delete(request: Request, video_id: str) -> Deleted:
    """Cancel a video where it is unfinished, wait until its ranks have let go, and remove its files and its record."""
    jobs = service_of(request).jobs
    await jobs.delete(await jobs.get(video_id, owner_of(request), "video"))
    return Deleted(id=video_id, object="video.deleted")


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": binary("video/mp4", "image/webp")},
        206: {"description": "A part of it.", "content": binary("video/mp4", "image/webp")},
        304: {"description": "The client has it."},
        **errors(400, 404, 409, 416, 503),
    },
)
async def content(request: Request, video_id: str, variant: Variant = "video") -> Response:
    """A finished video, its first frame, or a sheet of its frames."""
    service = service_of(request)
    job = await service.jobs.get(video_id, owner_of(request), "video")
    return await _content(request, service, job, variant)


async def _content(request: Request, service: Service, job: Job, variant: Variant) -> Response:
    require_completed(job)
    files = job.results("result" if variant == "video" else variant)
    if not files:
        raise ApiError(404, f"{job.id} has no {variant}.", code="not_found", param="variant")
    return await deliver(request, service.files, files[0].name, files[0].media_type)


def require_completed(job: Job) -> None:
    """Refuse a job that has no result, or not yet.

    Raises:
        ApiError: 409 where it is unfinished, 404 where it failed.
    """
    if job.status in UNFINISHED:
        message = f"{job.id} is {job.status.replace('_', ' ')}, at {job.progress} %. Wait until it is completed."
        raise ApiError(409, message, code="not_completed", param="id")
    if job.status == "failed":
        message = f"{job.id} has failed, and has no content: {job.error_message}"
        raise ApiError(404, message, code="job_failed", param="id")


def unsupported(what: str, instead: str) -> ApiError:
    """501: no pipeline here can do it."""
    return ApiError(501, f"{what} is not supported. {instead}", code="unsupported")

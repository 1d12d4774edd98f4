"""Pictures over HTTP: made from a prompt, changed, varied; in one answer or as a stream of events.

Owns the routes of `/v1/images`. Does not know how a request is checked or run.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from penstock.server.answers import format_of, images_answer, job_answer
from penstock.server.bodies import FORM, JSON, Body, reading
from penstock.server.endings import failure_of
from penstock.server.events import Event, stream, unless_left
from penstock.server.failures import invalid
from penstock.server.making import admit, begin
from penstock.server.openapi import JOB_ID, STREAM, errors
from penstock.server.pictures import Taken
from penstock.server.runs import Run
from penstock.server.schemas import EditAsk, ImageAsk, ImagesAnswer, JobAnswer, Usage, VariationAsk
from penstock.server.service import Service, service_of
from penstock.server.threads import CODING

router = APIRouter(prefix="/v1/images", tags=["images"])

Name = Literal["image_generation", "image_edit"]

CLIENT_LEFT = 499
_ANSWERS: dict[int | str, Any] = {
    200: {"description": "The pictures, or events where stream is true.", "content": STREAM, "headers": JOB_ID},
    202: {"description": "The job, where detach is true.", "model": JobAnswer, "headers": JOB_ID},
    **errors(400, 404, 408, 409, 413, 415, 429, 500, 503, 507),
}


@router.post("/generations", response_model=ImagesAnswer, responses=_ANSWERS)
async def generate(request: Request) -> Response:
    """Make pictures from a prompt."""
    admit(request, "image")
    async with reading(request, JSON, FORM) as body:
        run, fields = await _begin(request, ImageAsk, body, Taken())
    return await _answer(request, run, fields, "image_generation")


@router.post("/edits", response_model=ImagesAnswer, responses=_ANSWERS)
async def edit(request: Request) -> Response:
    """Change pictures by a prompt, within a mask where there is one."""
    pipeline = admit(request, "image")
    async with reading(request, FORM, JSON) as body:
        taken = Taken(fields={"image": "image", "mask": pipeline.mask}, wants="image")
        run, fields = await _begin(request, EditAsk, body, taken)
    return await _answer(request, run, fields, "image_edit")


@router.post("/variations", response_model=ImagesAnswer, responses=_ANSWERS)
async def vary(request: Request) -> Response:
    """Make pictures like another, without a prompt, where the pipeline can."""
    pipeline = admit(request, "image")
    if not pipeline.accepts_image or pipeline.requires("prompt"):
        wants = "wants a prompt" if pipeline.accepts_image else "takes no input picture"
        message = (
            f"{pipeline.name} {wants}, so it cannot make variations. Use /v1/images/edits where it takes pictures."
        )
        raise invalid("image", message, code="unsupported_by_model")
    async with reading(request, FORM, JSON) as body:
        run, fields = await _begin(request, VariationAsk, body, Taken(fields={"image": "image"}, wants="image"))
    return await _answer(request, run, fields, "image_generation")


async def _begin(request: Request, ask: type[ImageAsk], body: Body, taken: Taken) -> tuple[Run, ImageAsk]:
    fields = body.fields(ask)
    if fields.stream and fields.response_format == "url":
        message = "events carry the pictures themselves. Leave response_format or stream out."
        raise invalid("response_format", message)
    if fields.stream and fields.detach:
        raise invalid(
            "detach", "a stream lasts as long as its client, and detach goes on without. Leave one of them out."
        )
    wants_contents = fields.response_format != "url" and not fields.detach
    run = await begin(request, ask, body, taken, kind="image", wants_contents=wants_contents)
    return run, fields


async def _answer(request: Request, run: Run, fields: ImageAsk, name: Name) -> Response:
    service = service_of(request)
    headers = {"x-penstock-job-id": run.job.id}
    if fields.detach:
        job = job_answer(run.job, service.jobs, request)
        return Response(job.model_dump_json(), 202, headers, "application/json")
    if fields.stream:
        return stream(_events(run, fields, name), request, headers=headers, at_end=lambda: _let_go(service, run))
    if await unless_left(request, run.is_over.wait()) is None:
        _let_go(service, run)
        return Response(status_code=CLIENT_LEFT)
    if run.job.status == "failed" and not _is_unkept(run, fields):
        error = failure_of(run.job)
        error.headers |= headers
        raise error
    answer = images_answer(run, request, as_url=fields.response_format == "url")
    content = await CODING.run(lambda: answer.model_dump_json())
    return Response(content, media_type="application/json", headers=headers)


def _is_unkept(run: Run, fields: ImageAsk) -> bool:
    """Whether all was made and only the storage failed: who wanted the bytes gets them, for they exist."""
    has_all = len(run.contents) == run.order.request.num_images
    return run.job.error_code == "storage_failed" and has_all and fields.response_format != "url"


def _let_go(service: Service, run: Run) -> None:
    """Nobody waits for a run any more."""
    if not run.is_over.is_set():
        service.jobs.cancel(run, "client_left")


async def _events(run: Run, fields: ImageAsk, name: Name) -> AsyncIterator[Event]:
    """Unfinished pictures, then the finished ones, as OpenAI's clients know them."""
    told = set()
    with run.listening() as feed:
        async for news in feed:
            if news["type"] == "partial_image":
                content = await CODING.run(_content, news["path"])
                if content is not None:
                    index = {"partial_image_index": news["index"]}
                    yield _event(run, f"{name}.partial_image", {**index, "b64_json": content, "item": news["item"]})
            elif news["type"] == "kept":
                told.add(news["item"])
                yield _completed(run, name, news["item"])
    if run.job.status == "failed":
        if not _is_unkept(run, fields):
            raise failure_of(run.job)
        for item in sorted(run.contents.keys() - told):
            yield _completed(run, name, item)


def _completed(run: Run, name: Name, item: int) -> Event:
    seed = (run.job.seed or 0) + item
    done = {"b64_json": run.contents[item], "usage": Usage().model_dump(), "item": item, "seed": seed}
    return _event(run, f"{name}.completed", done)


def _event(run: Run, kind: str, more: dict[str, Any]) -> Event:
    facts = {
        "type": kind,
        "created_at": int(time.time()),
        "size": run.job.size or "auto",
        "quality": "auto",
        "background": "opaque",
        "output_format": format_of(run),
        "job_id": run.job.id,
    }
    return kind, {**facts, **more}


def _content(path: str) -> str | None:
    """A small file in base64; None where the run is over and has taken it along."""
    try:
        return base64.b64encode(Path(path).read_bytes()).decode("ascii")
    except FileNotFoundError:
        return None

"""Videos that go on from others, over HTTP: remix and edit begin from the first frame of a video.

Owns those routes, and the picture that is taken out of a video. Does not know how a request is checked or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from penstock.server.answers import video_answer
from penstock.server.bodies import FORM, JSON, Body, reading
from penstock.server.failures import ApiError, invalid
from penstock.server.files import Files
from penstock.server.frames import write_first_frame
from penstock.server.making import admit, begin
from penstock.server.openapi import errors
from penstock.server.pictures import Taken
from penstock.server.schemas import RemixAsk, VideoAnswer, VideoAsk
from penstock.server.service import owner_of, service_of
from penstock.server.threads import CODING, FILES
from penstock.server.videos import require_completed

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_MADE = errors(400, 404, 408, 409, 413, 415, 429, 501, 503, 507)
_CHUNK_BYTES = 2**20
_RIVALS = {"size": ("width", "height"), "seconds": ("num_frames",), "num_frames": ("seconds",)}


@router.post("/{video_id}/remix", response_model=VideoAnswer, responses=_MADE)
async def remix(request: Request, video_id: str) -> VideoAnswer:
    """Make a video from the first frame of another, with its settings and a new prompt."""
    async with reading(request, JSON) as body:
        prompt = body.fields(RemixAsk).prompt
    return await _go_on(request, video_id, {"prompt": prompt}, "video_id")


@router.post("/edits", response_model=VideoAnswer, responses=_MADE)
async def edit(request: Request) -> VideoAnswer:
    """Make a video from the first frame of a video that is sent along, or of one that was made here."""
    _require_pictures(request, "video")
    async with reading(request, FORM, JSON) as body:
        sent = body.files.pop("video", [])
        video = body.take("video")
        if isinstance(video, Mapping) and isinstance(video.get("id"), str):
            return await _go_on(request, video["id"], body.values, "video")
        if len(sent) != 1:
            raise invalid("video", 'a video is wanted: one file in a form, or {"id": ...} of a video here, in JSON.')
        most_pixels = service_of(request).settings.most_pixels
        taken = Taken(bring=lambda folder: _frame_of_upload(sent[0], folder, most_pixels))
        run = await begin(request, VideoAsk, body, taken, kind="video")
    return video_answer(run.job, service_of(request).jobs)


@router.post("/extensions", include_in_schema=False)
async def extend(request: Request) -> Response:
    """Not supported: no pipeline goes on where a video ends."""
    raise _unsupported("to extend a video", "Make a longer one: give seconds or num_frames.")


@router.post("/characters", include_in_schema=False)
async def create_character(request: Request) -> Response:
    """Not supported: no pipeline has characters."""
    raise _unsupported("to make a character", "Say in the prompt who is seen, or give an adapter in lora.")


@router.get("/characters/{character_id}", include_in_schema=False)
async def get_character(request: Request, character_id: str) -> Response:
    """Not supported: no pipeline has characters."""
    raise _unsupported("to look at a character", "Say in the prompt who is seen, or give an adapter in lora.")


def _unsupported(what: str, instead: str) -> ApiError:
    return ApiError(501, f"it is not supported {what}. {instead}", code="unsupported")


def _require_pictures(request: Request, param: str) -> None:
    pipeline = admit(request, "video")
    if not pipeline.accepts_image:
        message = f"{pipeline.name} begins from a prompt alone, so it cannot go on from a video. Make a new one."
        raise invalid(param, message, code="unsupported_by_model")


async def _go_on(request: Request, video_id: str, values: Mapping[str, Any], param: str) -> VideoAnswer:
    service = service_of(request)
    source = await service.jobs.get(video_id, owner_of(request), "video")
    _require_pictures(request, param)
    require_completed(source)
    name = source.results()[0].name
    body = Body(values=_merged(source.arguments, values))
    most_pixels = service.settings.most_pixels
    taken = Taken(bring=lambda folder: _frame_of_file(service.files, name, folder, most_pixels))
    run = await begin(request, VideoAsk, body, taken, kind="video", remixed_from=source.id)
    return video_answer(run.job, service.jobs)


def _merged(former: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a video with new ones in their place: of fields that say the same, only the new one stays."""
    kept = dict(former)
    given = {name for name, value in new.items() if value is not None}
    if given & {"width", "height"}:
        width, _, height = str(kept.pop("size", "")).partition("x")
        if height:
            kept |= {"width": int(width), "height": int(height)}
    for name in given:
        for rival in _RIVALS.get(name, ()):
            kept.pop(rival, None)
    return {**kept, **new}


async def _frame_of_file(files: Files, name: str, folder: Path, most_pixels: int) -> dict[str, tuple[str, ...]]:
    video = folder / "source.mp4"
    try:
        _, chunks = await files.get(name)
    except FileNotFoundError:
        raise ApiError(404, "the video's file has expired. Make it again.", code="not_found") from None
    with video.open("wb") as target:
        async for chunk in chunks:
            await FILES.run(target.write, chunk)
    return await _frame(video, most_pixels)


async def _frame_of_upload(upload: UploadFile, folder: Path, most_pixels: int) -> dict[str, tuple[str, ...]]:
    video = folder / "source.mp4"
    with video.open("wb") as target:
        while chunk := await upload.read(_CHUNK_BYTES):
            await FILES.run(target.write, chunk)
    return await _frame(video, most_pixels)


async def _frame(video: Path, most_pixels: int) -> dict[str, tuple[str, ...]]:
    picture = video.with_name("source.png")
    try:
        await CODING.run(write_first_frame, video, picture, most_pixels)
    except ValueError as error:
        raise invalid("video", f"the video cannot be read: {error}. Send an MP4 file.") from None
    return {"image": (str(picture),)}

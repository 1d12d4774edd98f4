"""Pictures that come with a request: which fields may hold them, and the files that they become.

Owns the way from a field to an argument of the pipeline. Does not know formats, limits or hosts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from penstock.errors import RequestError
from penstock.server.bodies import Body
from penstock.server.failures import ApiError, invalid
from penstock.server.pipeline import Pipeline
from penstock.server.service import Service
from penstock.server.threads import CODING
from penstock.server.uploads import Limits, TooLargeError, accept

Bring = Callable[[Path], Awaitable[Mapping[str, tuple[str, ...]]]]

_MOST_PICTURES = 16  # of one request, as in the official API
_OTHER_NAMES = {"image[]": "image", "images": "image", "images[]": "image"}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Which pictures an endpoint takes, beside the pipeline's arguments by their own names.

    Attributes:
        fields: of the API: name to the pipeline's argument; None where this pipeline has none.
        wants: the field without which nothing can be made.
        bring: makes pictures in the run's folder that do not come in the body.
    """

    fields: Mapping[str, str | None] = field(default_factory=dict)
    wants: str | None = None
    bring: Bring | None = None


async def pictures_of(
    body: Body, service: Service, pipeline: Pipeline, folder: Path, taken: Taken
) -> dict[str, tuple[str, ...]]:
    """Write the pictures of a body into a folder, and take their fields out of it.

    Returns:
        Argument of the pipeline to the paths of its pictures.

    Raises:
        ApiError: 400 naming the field, for what is no picture, or nothing that this pipeline takes; 413 for too large.
    """
    pictures: dict[str, tuple[str, ...]] = {}
    for name, sources in _sources(body, pipeline, taken).items():
        argument = taken.fields.get(name, name if name in pipeline.pictures else None)
        if argument == "image" and taken.wants == "image" and not pipeline.accepts_image:
            break  # which is said below, in words that help
        if argument is None or (argument == "image" and not pipeline.accepts_image):
            known = ", ".join(pipeline.pictures) or "none"
            message = f"{pipeline.name} takes no picture {name!r}. The pictures that it takes: {known}."
            raise invalid(name, message, code="unsupported_by_model")
        if len(sources) > 1 and not (argument == "image" and pipeline.accepts_several_images):
            raise invalid(name, f"{len(sources)} pictures came as {name}, and {pipeline.name} takes one. Send one.")
        if argument in pictures:
            raise invalid(name, f"{argument} is given twice. Keep one.")
        pictures[argument] = tuple([await _save(source, service, folder, name) for source in sources])
    if taken.bring is not None:
        pictures.update(await taken.bring(folder))
    if taken.wants is not None and taken.fields[taken.wants] not in pictures:
        if not pipeline.accepts_image:
            message = f"{pipeline.name} takes no input picture. Use /v1/images/generations, or serve a model that does."
            raise invalid(taken.wants, message, code="unsupported_by_model")
        raise invalid(taken.wants, f"{taken.wants} is missing. Send a picture.", code="missing_field")
    return pictures


def _sources(body: Body, pipeline: Pipeline, taken: Taken) -> dict[str, list[Any]]:
    """Field to the uploads and addresses that came for it."""
    sources: dict[str, list[Any]] = {}
    for name, uploads in body.files.items():
        given = [upload for upload in uploads if upload.filename or upload.size]  # a browser's empty field is none
        if given:
            sources.setdefault(_OTHER_NAMES.get(name, name), []).extend(given)
    known = {*taken.fields, *pipeline.pictures, *(other for other in _OTHER_NAMES if pipeline.accepts_image)}
    if "image" in taken.fields:
        known |= _OTHER_NAMES.keys()
    for name in [name for name in body.values if name in known]:
        value = body.values.pop(name)
        if value not in (None, "", []):
            sources.setdefault(_OTHER_NAMES.get(name, name), []).extend(_addresses(name, value))
    for name, given in sources.items():
        if len(given) > _MOST_PICTURES:
            raise invalid(name, f"{len(given)} pictures came as {name}. Send at most {_MOST_PICTURES}.")
    return sources


def _addresses(name: str, value: Any) -> list[str]:
    """The URLs in a JSON value: a text, `{"image_url": ...}` in either of its forms, or a list of those."""
    if isinstance(value, list):
        return [address for one in value for address in _addresses(name, one)]
    if isinstance(value, Mapping) and value.keys() == {"image_url"}:
        value = value["image_url"]
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    if not isinstance(value, str):
        message = f'{name} holds no picture. Send a file in a form, or {{"image_url": "data:image/png;base64,..."}}.'
        raise invalid(name, message)
    return [value]


async def _save(source: UploadFile | str, service: Service, folder: Path, name: str) -> str:
    settings = service.settings
    limits = Limits(num_bytes=settings.upload_bytes, num_pixels=settings.most_pixels)
    try:
        if isinstance(source, str):
            content: Any = await service.media.fetch(source, name)
        else:
            content = source.file
        upload = await CODING.run(accept, content, folder, limits, name)
    except TooLargeError as error:
        raise ApiError(413, str(error), code="too_large", param=name) from None
    except RequestError as error:
        raise invalid(name, str(error)) from None
    return upload.path

"""Files over HTTP: whole or in parts, by the name that nobody can guess, or as the content of a job.

Owns ranges, entity tags and the headers that keep a browser from taking a file for something else. Does not know what
is in a file.
"""

from __future__ import annotations

import hashlib
import re

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from penstock.server.failures import ApiError
from penstock.server.files import FileRangeError, Files
from penstock.server.openapi import binary, errors
from penstock.server.service import service_of

router = APIRouter(tags=["files"])

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
}
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)")
_FAR = 2**62  # behind the end of every file
_MOST_DIGITS = 18


@router.head("/v1/files/{name}", include_in_schema=False)
@router.get(
    "/v1/files/{name}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": binary(*MEDIA_TYPES.values())},
        206: {"description": "A part of it.", "content": binary(*MEDIA_TYPES.values())},
        304: {"description": "The client has it."},
        **errors(404, 416, 503),
    },
)
async def file(request: Request, name: str) -> Response:
    """A file by its name; whoever knows the name may have it, so no key is asked for."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    return await deliver(request, service_of(request).files, name, MEDIA_TYPES.get(suffix, "application/octet-stream"))


async def deliver(request: Request, files: Files, name: str, media_type: str) -> Response:
    """The answer with a file, or with the part of it that is asked for.

    Raises:
        ApiError: 404 where there is none, 416 for a range that it does not have.
        StorageError: where the storage fails.

    Cost: one chunk of it is in memory at a time.
    """
    tag = f'"{hashlib.sha256(name.encode()).hexdigest()[:32]}"'  # a name is never given to other bytes
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'inline; filename="{name}"',
        "content-security-policy": "default-src 'none'; sandbox",
        "etag": tag,
        "x-content-type-options": "nosniff",
    }
    try:
        if _matches(request.headers.get("if-none-match"), tag):
            await files.get(name)  # nothing is unchanged that is not there
            return Response(status_code=304, headers=headers)
        start, end = _range(request, tag)
        if start is not None and start < 0:
            size, _ = await files.get(name)
            start = max(size + start, 0)
        size, chunks = await files.get(name, start, end)
    except FileNotFoundError:
        message = f"there is no file {name[:80]!r}: it never was, or has expired."
        raise ApiError(404, message, code="not_found", param="name") from None
    except FileRangeError as error:
        headers = {"content-range": f"bytes */{error.size}"}
        raise ApiError(416, str(error), code="range_not_satisfiable", param="range", headers=headers) from None
    first, last = start or 0, size if end is None else min(end, size)
    status = 200
    if (start, end) != (None, None):
        status = 206
        headers["content-range"] = f"bytes {first}-{last - 1}/{size}"
    headers["content-length"] = str(last - first)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(chunks, status, headers, media_type)


def _matches(given: str | None, tag: str) -> bool:
    return given is not None and (
        given.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in given.split(",")]
    )


def _range(request: Request, tag: str) -> tuple[int | None, int | None]:
    """First byte and the byte after the last, of one range; a negative first counts from the end; None: all of it."""
    given, condition = request.headers.get("range"), request.headers.get("if-range")
    match = _RANGE.fullmatch((given or "").replace(" ", ""))
    if match is None or (condition is not None and condition != tag) or (not match[1] and not match[2]):
        return None, None  # several ranges, or what is none: all of it, as the standard allows
    if not match[1]:
        length = _place(match[2])
        return (-length, None) if length else (_FAR, None)
    first, last = _place(match[1]), _place(match[2]) + 1 if match[2] else None
    if last is not None and last <= first:
        return None, None
    return first, last


def _place(digits: str) -> int:
    """A number of bytes, however many digits a client writes."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= _MOST_DIGITS else _FAR

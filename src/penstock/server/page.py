"""The page at `/`: a few files of this package, served as they are.

Owns which files those are, and the headers that keep the page to itself: nothing from elsewhere, no inline script.
Does not know jobs, the engine or keys; the page asks the API as any other client does.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter, HTTPException, Request, Response

_SCRIPTS = ("app.js", "api.js", "elements.js", "form.js", "gallery.js", "machine.js", "run.js", "view.js")

MEDIA_TYPES = MappingProxyType(
    {
        "index.html": "text/html; charset=utf-8",
        "style.css": "text/css; charset=utf-8",
        "icon.svg": "image/svg+xml",
        **dict.fromkeys(_SCRIPTS, "text/javascript; charset=utf-8"),
    }
)
"""The files of the page, and what each is; no other name is ever looked up."""

HEADERS = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        ),
        "Cache-Control": "no-cache",  # kept, but asked for again: a new penstock shows its new page at once
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)
"""What goes with every file."""

router = APIRouter(include_in_schema=False)
"""`/` and `/page/{name}`; both need no key, for there is nothing of anybody in them."""


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page itself."""
    return _answer(request, "index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(request: Request, name: str) -> Response:
    """A file that the page asks for.

    Raises:
        HTTPException: 404 for any name that is not one of them.
    """
    if name not in MEDIA_TYPES:
        raise HTTPException(404, f"the page has no file {name!r}.")
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    content, tag = _read(name)
    headers = {**HEADERS, "ETag": tag}
    if tag in [known.strip().removeprefix("W/") for known in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=MEDIA_TYPES[name], headers=headers)


@cache
def _read(name: str) -> tuple[bytes, str]:
    content = (files("penstock.server") / "page" / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'

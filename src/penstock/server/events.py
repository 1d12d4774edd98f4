"""Server-sent events: a stream that lives while its client does.

Owns the wire: events, comments that keep a silent connection open, an error as the last event, and the watch for a
client that leaves. Does not know what the events are about.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event

from penstock.server.failures import ApiError
from penstock.server.threads import CODING

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_END: Any = object()

Event = tuple[str, dict[str, Any]]
"""Its name, and what goes with it."""


def stream(
    events: AsyncIterator[Event],
    request: Request,
    *,
    headers: dict[str, str] | None = None,
    at_end: Callable[[], None] | None = None,
) -> EventSourceResponse:
    """An answer of events, until there are no more or the client leaves.

    Args:
        events: what to send; an ApiError that it raises becomes an `error` event, and the end.
        request: whose client is watched.
        headers: of the answer.
        at_end: called when nothing more is sent, for whichever reason.
    """
    return EventSourceResponse(_lines(events, request, at_end), headers={**_HEADERS, **(headers or {})})


async def _lines(
    events: AsyncIterator[Event], request: Request, at_end: Callable[[], None] | None
) -> AsyncIterator[bytes]:
    try:
        yield format_sse_event(comment="penstock")  # the headers are on their way at once
        async with aclosing(_watched(events, request)) as lines:
            async for line in lines:
                yield line
    finally:
        if at_end is not None:
            at_end()


async def _watched(events: AsyncIterator[Event], request: Request) -> AsyncGenerator[bytes, None]:
    left = asyncio.create_task(departure(request))
    coming: asyncio.Task[Any] | None = None
    try:
        while not left.done():
            coming = coming or asyncio.create_task(_next(events))
            done, _ = await asyncio.wait({coming, left}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if coming in done:
                try:
                    event = coming.result()
                except ApiError as error:
                    yield _line("error", {"type": "error", **error.body()})
                    return
                coming = None
                if event is _END:
                    return
                yield await CODING.run(_line, *event) if "b64_json" in event[1] else _line(*event)
            elif not done:
                yield format_sse_event(comment="keep-alive")
    finally:
        for task in (left, coming):
            if task is not None:
                task.cancel()


async def _next(events: AsyncIterator[Event]) -> Any:
    return await anext(events, _END)


def _line(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=msgspec.json.encode(data).decode())


async def departure(request: Request) -> None:
    """Return once the client has left; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Do something while a client waits for it; None where it leaves before the end, and the work is dropped."""
    left, doing = asyncio.create_task(departure(request)), asyncio.create_task(work)
    try:
        await asyncio.wait({left, doing}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        left.cancel()
        doing.cancel()

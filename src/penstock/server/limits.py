"""ASGI: no more of a body is read than the server takes, and an answer reaches a client that is still sending.

Owns the count of bytes. Does not know what is in a body.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.failures import ApiError

LINGER_S = 10.0
_LINGER_BYTES = 2**28  # that are thrown away after an answer; a client that sends still more misses it


class BodyLimit:
    """Refuses bodies that are too large, by their announced length or as soon as they have grown so far.

    A server that closes a connection while its client sends makes that client's system drop the answer. So where the
    answer comes before the end of the body, the rest is taken and thrown away for a while.

    Args:
        app: is protected.
        num_bytes: most of a body.
        text: how the user wrote that number.
    """

    def __init__(self, app: ASGIApp, *, num_bytes: int, text: str) -> None:
        self._app = app
        self._num_bytes = num_bytes
        self._text = text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what fits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        body = _Body(receive, send, has_more=announced not in ("", "0") or "transfer-encoding" in headers)
        if announced.isdecimal() and int(announced[:20]) > self._num_bytes:
            await self._too_large().response()(scope, body.receive, body.send)
            return

        async def limited() -> Message:
            message = await body.receive()
            if body.num_bytes > self._num_bytes:
                raise self._too_large()
            return message

        await self._app(scope, limited, body.send)

    def _too_large(self) -> ApiError:
        message = (
            f"the body is larger than {self._text}, the most that this server takes. Send less, such as a smaller "
            "picture, or start the server with a larger --max-upload."
        )
        return ApiError(413, message, code="request_too_large")


class _Body:
    """What has come of a body, and an answer that waits for the rest of it."""

    def __init__(self, receive: Receive, send: Send, *, has_more: bool) -> None:
        self._receive = receive
        self._send = send
        self._has_more = has_more
        self.num_bytes = 0

    async def receive(self) -> Message:
        """The next part."""
        message = await self._receive()
        self.num_bytes += len(message.get("body", b""))
        self._has_more = message["type"] == "http.request" and bool(message.get("more_body"))
        return message

    async def send(self, message: Message) -> None:
        """A part of the answer; the last one only when nothing more comes."""
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        if not is_last or not self._has_more:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._has_more and self.num_bytes < _LINGER_BYTES:
                    await self.receive()
        await self._send({"type": "http.response.body", "body": b""})

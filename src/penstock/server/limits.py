"""ASGI: no more of a body is read than the server takes, and an answer reaches a client that is still sending.

Owns the count of bytes, and how long a client may leave a body half sent. Does not know what is in a body.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.failures import ApiError

BODY_S = 30.0
"""Seconds in which the next part of a body must have come."""
LINGER_S = 10.0
_RETRY_S = 5
_AT_ONCE = 4  # of the largest bodies may be half sent at a time: what has come of them is in memory
_LINGER_BYTES = 2**28  # that are thrown away after an answer; a client that sends still more misses it


class BodyLimit:
    """Refuses bodies that are too large, by their announced length or as soon as they have grown so far.

    A server that closes a connection while its client sends makes that client's system drop the answer. So where the
    answer comes before the end of the body, the rest is taken and thrown away for a while.

    A body that stops half-way is given up after `BODY_S`. Those that are half sent share the room of four of the
    largest; one that finds none is asked to come again.

    Args:
        app: is protected.
        num_bytes: most of a body.
        text: how the user wrote that number.
    """

    def __init__(self, app: ASGIApp, *, num_bytes: int, text: str) -> None:
        self._app = app
        self._num_bytes = num_bytes
        self._text = text
        self._num_free = _AT_ONCE * num_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what fits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced and "transfer-encoding" in headers:
            await _two_lengths().response()(scope, receive, send)
            return
        body = _Body(receive, send, has_more=announced not in ("", "0") or "transfer-encoding" in headers)
        if announced.isdecimal() and int(announced[:20]) > self._num_bytes:
            await self._too_large().response()(scope, body.receive, body.send)
            return

        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await body.receive_soon()
            if body.num_bytes > self._num_bytes:
                raise self._too_large()
            wanted = body.num_bytes if body.has_more else 0
            if wanted - taken > self._num_free:
                raise self._crowded()
            self._num_free -= wanted - taken
            taken = wanted
            return message

        try:
            await self._app(scope, limited, body.send)
        finally:
            self._num_free += taken

    def _too_large(self) -> ApiError:
        message = (
            f"the body is larger than {self._text}, the most that this server takes. Send less, such as a smaller "
            "picture, or start the server with a larger --max-upload."
        )
        return ApiError(413, message, code="request_too_large")

    def _crowded(self) -> ApiError:
        message = f"bodies of {_AT_ONCE} x {self._text} are on their way already, the most at a time. Send it again."
        return ApiError(503, message, code="bodies_at_once", retry_after_s=_RETRY_S)


def _two_lengths() -> ApiError:
    """400 for a body whose end two headers tell, perhaps differently: so are requests smuggled past a proxy."""
    message = "Content-Length and Transfer-Encoding are both given, and a body has one end. Send one of them."
    return ApiError(400, message, code="malformed_http", headers={"connection": "close"})


class _Body:
    """What has come of a body, and an answer that waits for the rest of it.

    Attributes:
        num_bytes: that have come.
        has_more: whether it is not whole yet.
    """

    def __init__(self, receive: Receive, send: Send, *, has_more: bool) -> None:
        self._receive = receive
        self._send = send
        self.has_more = has_more
        self.num_bytes = 0

    async def receive(self) -> Message:
        """The next part."""
        message = await self._receive()
        self.num_bytes += len(message.get("body", b""))
        self.has_more = message["type"] == "http.request" and bool(message.get("more_body"))
        return message

    async def receive_soon(self) -> Message:
        """The next part; once all is there, that the client has left, whenever that is.

        Raises:
            ApiError: 408 where no part came in time; its answer ends the connection.
        """
        try:
            async with asyncio.timeout(BODY_S if self.has_more else None):
                return await self.receive()
        except TimeoutError:
            self.has_more = False  # nobody waits for the rest of it
            message = f"nothing more of the body came for {BODY_S:g} s, after {self.num_bytes} bytes. Send it again."
            raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None

    async def send(self, message: Message) -> None:
        """A part of the answer; the last one only when nothing more comes."""
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        if not is_last or not self.has_more:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self.has_more and self.num_bytes < _LINGER_BYTES:
                    await self.receive()
        await self._send({"type": "http.response.body", "body": b""})

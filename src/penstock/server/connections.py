"""Connections: how many there may be, how long one may be silent, and what is said where no more can be had.

Owns what happens to a connection before a request begins on it and between two of them. Does not know routes or jobs.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import time
from contextlib import suppress
from typing import Any

import h11
import msgspec
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.server.failures import envelope

HEAD_S = 30.0
"""Seconds in which the head of a request must have come, from when it is waited for."""
AT_ONCE = 64
"""Connections taken in one turn of the loop; where it has no descriptor, asyncio fails as often in a turn."""
QUEUED = 2048
"""Connections that the system keeps until they are taken; those that find no place try again a second later."""
_SILENCE_S = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def raise_limit() -> None:
    """Take as many descriptors as the system lets this process have: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # systems that do not let have what they promise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connection(H11Protocol):
    """uvicorn's; closed where the head of a request does not come, and answered in the envelope where it is no HTTP."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Wait on where a request has begun to come; no longer for it, however slowly it comes."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, where no other answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            said = "the request is no HTTP/1.1 that can be read, or its head is too large. Send another."
            body = msgspec.json.encode(envelope(400, said, code="malformed_http"))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=400, headers=headers, reason="Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Complaints:
    """What an event loop says of failures that nobody waits for: too few descriptors once a minute, in one line."""

    def __init__(self) -> None:
        self._last_s = -_SILENCE_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Tell of a failure."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _EXHAUSTED:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._last_s >= _SILENCE_S:
            self._last_s = time.monotonic()
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            structlog.get_logger().warning("no more connections can be taken", reason=error.strerror, descriptors=most)

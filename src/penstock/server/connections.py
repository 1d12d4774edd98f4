"""Connections: how many there may be, how long one may be silent or leave its answer, and what is said where no more
can be had.

Owns what happens to a connection outside of its requests. Does not know routes or jobs.
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
READ_S = 120.0
"""Seconds in which a client must have read on, where more waits for it than the system keeps on the way."""
AT_ONCE = 64
"""Connections taken in one turn of the loop; where it has no descriptor, asyncio fails as often in a turn."""
QUEUED = 2048
"""Connections that the system keeps until they are taken; those that find no place try again a second later."""
PROBE_S = 0.25
"""Seconds between the first two words to a client that sends no more; later ones come every `PROBES_S`."""
PROBES_S = 2.0
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"  # which every client passes over
_SILENCE_S = 60.0
_WHOLE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def raise_limit() -> None:
    """Take as many descriptors as the system lets this process have: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # systems that do not let have what they promise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connection(H11Protocol):
    """uvicorn's; closed where no head comes or no answer is read; what is no HTTP is answered in the envelope."""

    _timer: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _probe: asyncio.TimerHandle | None = None
    _is_half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._unwatch()
        self._unwatch_reader()
        self._end_probe()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: it has left, or waits for its answer with one half of the connection closed.

        Both look alike until something is written: the system of a client that has left refuses it. So where a whole
        request waits for its answer, and nothing of that was sent, the client is told to wait.

        Returns:
            Whether the connection stays.
        """
        if self.cycle is None or self.cycle.response_started or self.conn.their_state not in _WHOLE:
            return False
        if self.conn.their_http_version == b"1.0":
            return False  # it knows no interim answers
        self._is_half_closed = True
        self._send_probe(PROBE_S)
        return True

    def on_response_complete(self) -> None:
        """The next request of those that have come; a client that sends no more has no further one."""
        super().on_response_complete()
        if self._is_half_closed and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Wait on where a request has begun to come; no longer for it, however slowly it comes."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._unwatch()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read: what it does not take stays in memory."""
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        self._unwatch_reader()
        super().resume_writing()

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

    def _send_probe(self, next_s: float) -> None:
        self._probe = None
        if self.cycle is None or self.cycle.response_started or self.transport.is_closing():
            return
        self.transport.write(_PROBE)
        self._probe = self.loop.call_later(next_s, self._send_probe, PROBES_S)

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None

    def _unwatch_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

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

"""Bodies within their limit, and answers that reach clients which are still sending."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.server import limits
from penstock.server.limits import BodyLimit


class Exchange:
    """One request in chunks, and what was answered."""

    def __init__(self, *chunks: bytes, headers: dict[str, str] | None = None) -> None:
        self.chunks = list(chunks)
        self.sent: list[dict[str, Any]] = []
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        for name, value in (headers or {}).items():
            self.scope["headers"].append((name.encode(), value.encode()))  # type: ignore[attr-defined]

    async def receive(self) -> dict[str, Any]:
        if not self.chunks:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.chunks.pop(0), "more_body": bool(self.chunks)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def go(self, app: Any, num_bytes: int = 100) -> int:
        asyncio.run(BodyLimit(app, num_bytes=num_bytes, text="100B")(self.scope, self.receive, self.send))
        return int(self.sent[0]["status"])


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"read"})


async def reads_nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": []})
    await send({"type": "http.response.body", "body": b"no"})


def test_what_fits_passes() -> None:
    exchange = Exchange(b"x" * 60, b"y" * 40, headers={"content-length": "100"})
    assert exchange.go(reads_all) == 200 and exchange.sent[-1]["body"] == b"read"


def test_an_announced_length_is_enough_to_refuse() -> None:
    exchange = Exchange(b"x" * 101, headers={"content-length": "101"})
    assert exchange.go(reads_all) == 413 and b"--max-upload" in exchange.sent[1]["body"]


def test_without_an_announced_length_the_bytes_are_counted() -> None:
    exchange = Exchange(b"x" * 60, b"y" * 41, b"z" * 60, headers={"transfer-encoding": "chunked"})
    with pytest.raises(limits.ApiError) as caught:
        exchange.go(reads_all)
    assert caught.value.status == 413 and len(exchange.chunks) == 1


def test_the_rest_is_taken_before_the_connection_may_close() -> None:
    exchange = Exchange(*[b"x" * 30] * 3, headers={"content-length": "90"})
    assert exchange.go(reads_nothing) == 401
    assert exchange.chunks == [] and [message.get("more_body", False) for message in exchange.sent] == [
        False,
        True,
        False,
    ]
    assert b"".join(message.get("body", b"") for message in exchange.sent) == b"no"


def test_a_request_without_a_body_is_not_waited_for() -> None:
    exchange = Exchange()
    assert exchange.go(reads_nothing) == 401 and len(exchange.sent) == 2


def test_a_client_that_goes_on_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.05)
    exchange = Exchange(b"x", headers={"content-length": "90"})

    async def never() -> Any:
        await asyncio.sleep(3600)

    exchange.receive = never  # type: ignore[method-assign]
    assert exchange.go(reads_nothing) == 401 and len(exchange.sent) == 3

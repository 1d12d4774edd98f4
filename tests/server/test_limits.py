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
    assert exchange.go(reads_all) == 413
    assert b"max_upload" in exchange.sent[1]["body"] and b"--" not in exchange.sent[1]["body"]  # a field, not a flag


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


async def never() -> Any:
    await asyncio.sleep(3600)


def test_a_body_that_stops_half_way_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.05)
    exchange = Exchange(headers={"content-length": "90"})
    parts = [b"x" * 30, b"y" * 30]

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": True} if parts else await never()

    exchange.receive = receive  # type: ignore[method-assign]
    with pytest.raises(limits.ApiError, match="nothing more of the body came for 0.05 s, after 60 bytes") as caught:
        exchange.go(reads_all)
    assert caught.value.status == 408 and caught.value.headers == {"connection": "close"}


def test_whoever_waits_for_an_answer_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.02)

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"x"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.1)  # whether the client has left
        await reads_nothing(scope, receive, send)

    exchange = Exchange(b"x", headers={"content-length": "1"})
    first = exchange.receive

    async def receive() -> Any:
        return await (first() if exchange.chunks else never())

    exchange.receive = receive  # type: ignore[method-assign]
    assert exchange.go(waits) == 401


def test_half_sent_bodies_share_a_room() -> None:
    async def main() -> list[Any]:
        going_on = asyncio.Event()
        limit = BodyLimit(reads_all, num_bytes=100, text="100B")

        async def ask(num_bytes: int) -> int | str:
            exchange = Exchange(b"x" * num_bytes, b"y", headers={"transfer-encoding": "chunked"})
            chunks = exchange.receive

            async def receive() -> Any:
                if len(exchange.chunks) == 1:
                    await going_on.wait()
                return await chunks()

            try:
                await limit(exchange.scope, receive, exchange.send)
            except limits.ApiError as error:
                return str(error.code)
            return int(exchange.sent[0]["status"])

        held = [asyncio.create_task(ask(99)) for _ in range(4)]
        await asyncio.sleep(0.01)
        crowded, small = await ask(5), asyncio.create_task(ask(4))
        await asyncio.sleep(0.01)
        going_on.set()
        answers = [crowded, await small, *[await one for one in held]]
        return [*answers, *[await ask(99) for _ in range(5)]]  # the room is free again

    assert asyncio.run(main()) == ["bodies_at_once", *[200] * 10]


def test_a_client_that_goes_on_for_ever_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.05)
    exchange = Exchange(b"x", headers={"content-length": "90"})
    exchange.receive = never  # type: ignore[method-assign]
    assert exchange.go(reads_nothing) == 401 and len(exchange.sent) == 3

"""Server-sent events live while their client does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request

from penstock.server import events
from penstock.server.events import Event, stream, unless_left
from penstock.server.failures import ApiError


class Client:
    """A client of an ASGI answer: what it got, and when it leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.got = b""
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"spec_version": "2.4"}}
        self.request = Request(scope, self.receive)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.got += message.get("body", b"")

    async def read(self, source: AsyncIterator[Event], **options: Any) -> list[str]:
        answer = stream(source, self.request, **options)
        await answer(self.request.scope, self.receive, self.send)
        return self.got.decode().split("\n\n")


async def some(*given: Event, then: float = 0.0) -> AsyncIterator[Event]:
    for event in given:
        yield event
    await asyncio.sleep(then)


def test_events_then_the_end() -> None:
    ends: list[str] = []

    async def main() -> list[str]:
        return await Client().read(some(("a", {"n": 1}), ("b", {"t": "x\ny"})), at_end=lambda: ends.append("end"))

    blocks = asyncio.run(main())
    assert blocks == [": penstock", 'event: a\ndata: {"n":1}', 'event: b\ndata: {"t":"x\\ny"}', ""]
    assert ends == ["end"]


def test_pictures_are_encoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    encode = events._line
    monkeypatch.setattr(events, "_line", lambda *event: threads.append(threading.get_ident()) or encode(*event))

    async def main() -> list[str]:
        return await Client().read(some(("a", {"b64_json": "x"}), ("b", {})))

    blocks = asyncio.run(main())
    assert blocks[1:3] == ['event: a\ndata: {"b64_json":"x"}', "event: b\ndata: {}"]
    assert threads[0] != threading.get_ident() == threads[1]


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.02)

    async def main() -> list[str]:
        client = Client()

        async def silent() -> AsyncIterator[Event]:
            yield "a", {}
            async with asyncio.timeout(20):
                while client.got.count(b": keep-alive") < 2:
                    await asyncio.sleep(0.01)

        return await client.read(silent())

    blocks = asyncio.run(main())
    assert blocks.count(": keep-alive") >= 2 and blocks[1] == "event: a\ndata: {}"


def test_an_error_is_the_last_event() -> None:
    async def failing() -> AsyncIterator[Event]:
        yield "a", {}
        raise ApiError(507, "it does not fit. Ask for less.", code="out_of_memory")

    async def main() -> list[str]:
        return await Client().read(failing())

    name, data = asyncio.run(main())[-2].split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert error["type"] == "error" and error["error"]["code"] == "out_of_memory"


def test_a_client_that_leaves_ends_the_stream() -> None:
    ends: list[str] = []
    closed: list[str] = []

    async def endless() -> AsyncIterator[Event]:
        try:
            yield "a", {}
            await asyncio.sleep(3600)
        finally:
            closed.append("closed")

    async def main() -> None:
        client = Client()
        asyncio.get_running_loop().call_later(0.05, client.left.set)
        await asyncio.wait_for(client.read(endless(), at_end=lambda: ends.append("end")), 10)

    asyncio.run(main())
    assert ends == ["end"] and closed == ["closed"]


def test_waiting_unless_the_client_leaves() -> None:
    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    async def main() -> list[str | None]:
        staying, leaving = Client(), Client()
        leaving.left.set()
        return [await unless_left(staying.request, work(0)), await unless_left(leaving.request, work(3600))]

    assert asyncio.run(main()) == ["done", None]

"""The clients of benchmarks/serve.py: one, several or a crowd, in a process of their own.

    python benchmarks/serve_clients.py PORT

Speaks just enough HTTP/1.1 to cost little of the machine that it measures. For each line of JSON on stdin:

    {"do": "ask", "clients": 4, "count": 40, "steps": 8}        pictures as fast as the clients can have them
    {"do": "crowd", "clients": 200, "for_s": 60, "steps": 8}    the same for a while; who is told 429 waits as told
    {"do": "probe", "for_s": 60}                                /health, fifty times a second

it answers one line of JSON. Pictures are decoded and told from each other by their pixels.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

PROMPT = "a red circle left of a blue square"
NUM_SEEDS = 8
PROBE_S = 0.02
MOST_WAIT_S = 5.0
MOST_ANSWER_S = 120.0


class Connection:
    """A connection that is kept, and made anew where the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of an answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(first.split()[1]), headers, content

    def close(self) -> None:
        """Let go of it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Story:
    """What came back.

    Attributes:
        latencies_s: of answers with a picture.
        refusals_s: of answers 429.
        statuses: how many of each.
        digests: pictures by seed.
        strange: answers that are neither a picture nor 429.
    """

    latencies_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    digests: dict[int, set[str]] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    contents: list[tuple[int, bytes]] = field(default_factory=list)

    def look(self) -> None:
        """Decode the pictures that have come so far."""
        for seed, content in self.contents:
            try:
                data = base64.b64decode(json.loads(content)["data"][0]["b64_json"])
                pixels = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
            except (ValueError, LookupError, TypeError, OSError) as error:
                self.strange.append(f"200 without a picture: {error}")
            else:
                self.digests.setdefault(seed, set()).add(hashlib.sha256(pixels).hexdigest())
        self.contents.clear()

    def told(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "latencies_s": self.latencies_s,
            "refusals_s": self.refusals_s,
            "statuses": dict(self.statuses),
            "digests": {str(seed): sorted(found) for seed, found in sorted(self.digests.items())},
            "num_strange": len(self.strange),
            "strange": self.strange[:5],
        }


async def one_picture(connection: Connection, story: Story, seed: int, steps: int) -> float:
    """Ask for a picture; returns for how long to wait before asking again."""
    body = json.dumps({"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}).encode()
    begun_s = time.perf_counter()
    try:
        async with asyncio.timeout(MOST_ANSWER_S):
            status, headers, content = await connection.ask("POST", "/v1/images/generations", body)
    except (OSError, EOFError, TimeoutError) as error:
        connection.close()
        story.strange.append(f"{type(error).__name__}: {error}")
        return 0.1
    took_s = time.perf_counter() - begun_s
    story.statuses[str(status)] += 1
    if status == 200:
        story.latencies_s.append(took_s)
        story.contents.append((seed, content))
        return 0.0
    if status != 429 or "retry-after" not in headers:
        story.strange.append(f"{status}: {content[:200].decode(errors='replace')}")
        return 0.1
    story.refusals_s.append(took_s)
    return min(MOST_WAIT_S, float(headers["retry-after"]))


async def ask(port: int, clients: int, count: int, steps: int) -> dict[str, Any]:
    """A number of pictures, by clients that take the next as soon as they have one."""
    story, numbers = Story(), iter(range(count))

    async def client() -> None:
        connection = Connection(port)
        for number in numbers:
            await one_picture(connection, story, number % NUM_SEEDS, steps)
        connection.close()

    begun_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall_s = time.perf_counter() - begun_s
    story.look()
    return {"wall_s": wall_s, **story.told()}


async def crowd(port: int, clients: int, for_s: float, steps: int) -> dict[str, Any]:
    """Clients for a while, each with a connection of its own."""
    story, numbers = Story(), itertools.count()
    begun_s = time.perf_counter()
    end_s = begun_s + for_s

    async def client() -> None:
        connection = Connection(port)
        while time.perf_counter() < end_s:
            wait_s = await one_picture(connection, story, next(numbers) % NUM_SEEDS, steps)
            story.look()
            await asyncio.sleep(min(wait_s, max(0.0, end_s - time.perf_counter())))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"wall_s": time.perf_counter() - begun_s, **story.told()}


async def probe(port: int, for_s: float) -> dict[str, Any]:
    """Seconds that /health takes, asked at even moments whatever the last answer took."""
    story, connection, begun_s = Story(), Connection(port), time.perf_counter()
    for number in range(int(for_s / PROBE_S)):
        due_s = begun_s + number * PROBE_S
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        asked_s = time.perf_counter()
        try:
            status, _, content = await connection.ask("GET", "/health")
        except (OSError, EOFError) as error:
            connection.close()
            story.strange.append(f"{type(error).__name__}: {error}")
            continue
        story.statuses[str(status)] += 1
        story.latencies_s.append(time.perf_counter() - asked_s)
        if status != 200:
            story.strange.append(f"{status}: {content[:200].decode(errors='replace')}")
    return story.told()


DEEDS = {"ask": ask, "crowd": crowd, "probe": probe}


def main() -> None:
    """Answer each line of stdin."""
    port = int(sys.argv[1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(asyncio.run(DEEDS[wanted.pop("do")](port, **wanted))), flush=True)


if __name__ == "__main__":
    main()

"""A run: a job while this server makes it. What the engine tells becomes progress, and news for whoever listens.

Owns progress (the real step, never backwards, 100 only at the end) and the feeds of listeners. Lives in the event
loop's thread; only `hear` is called from another. Does not know the store, files or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from penstock.server.job import Job, JobFile
from penstock.wire import Began, MadeFile, Order, OrderEvent, Partial, Stage, Step

MOST_UNFINISHED = 99
_MOST_NEWS = 256  # that wait for a slow listener; beyond, older steps give way

News = dict[str, Any]
"""What a listener is told: `type` is progress, partial_image, kept, or ended."""


class Feed:
    """News that one listener has not taken yet."""

    def __init__(self) -> None:
        self._news: deque[News] = deque()
        self._came = asyncio.Event()

    def put(self, news: News) -> None:
        """Add news; where too much waits, the oldest progress is dropped."""
        if len(self._news) >= _MOST_NEWS:
            old = next((one for one in self._news if one["type"] == "progress"), None)
            if old is not None:
                self._news.remove(old)
        self._news.append(news)
        self._came.set()

    async def get(self) -> News:
        """The oldest news, once there is some."""
        while not self._news:
            self._came.clear()
            await self._came.wait()
        return self._news.popleft()

    def __aiter__(self) -> AsyncIterator[News]:
        return self._all()

    async def _all(self) -> AsyncIterator[News]:
        while True:
            news = await self.get()
            yield news
            if news["type"] == "ended":
                return


class Run:
    """A job on its way.

    Args:
        job: as it was accepted.
        order: as the engine has it.
        wants_contents: whether somebody waits for the bytes of the results, not only for their record.
        num_stages: denoising stages that this pipeline was seen to have.

    Attributes:
        job: as it is now; the record may be a little behind.
        contents: base64 of finished items, where they are wanted.
        cancel_reason: why it was cancelled: client_left, stopped, deleted or server_stopped; empty otherwise.
        client: what the log says of who asked.
        is_over: set once the job has ended and is recorded.
    """

    def __init__(self, job: Job, order: Order, *, wants_contents: bool = False, num_stages: int = 1) -> None:
        self.job = job
        self.order = order
        self.wants_contents = wants_contents
        self.contents: dict[int, str] = {}
        self.made: list[MadeFile] = []
        self.kept: list[JobFile] = []
        self.saving: list[asyncio.Task[None]] = []
        self.cancel_reason = ""
        self.client: dict[str, Any] = {}
        self.num_stages = num_stages
        self.is_over = asyncio.Event()
        self.heard: asyncio.Queue[OrderEvent] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._feeds: list[Feed] = []
        self._history: list[News] = []
        self._begun_s = time.monotonic()
        self._last: News = self._progress("queue", 0)

    def hear(self, event: OrderEvent) -> None:
        """What the engine calls, in its own thread."""
        try:
            self._loop.call_soon_threadsafe(self.heard.put_nowait, event)
        except RuntimeError:
            return  # the loop is closed: the server has gone

    @contextmanager
    def listening(self) -> Iterator[Feed]:
        """A feed that begins with where the run stands, and with what came before that."""
        feed = Feed()
        for news in (self._last, *self._history):
            feed.put(news)
        if self.is_over.is_set():
            feed.put({"type": "ended"})
        self._feeds.append(feed)
        try:
            yield feed
        finally:
            self._feeds.remove(feed)

    def waiting(self) -> News:
        """That it still waits."""
        return self._progress("queue", 0)

    def tell(self, news: News) -> None:
        """Give news to all listeners."""
        if news["type"] == "progress":
            self._last = news
        elif news["type"] != "ended":
            self._history.append(news)
        for feed in self._feeds:
            feed.put(news)

    def advance(self, event: OrderEvent) -> int | None:
        """Take an event in, and tell of it.

        Returns:
            The percents that are done, where they grew; None otherwise.
        """
        match event:
            case Began():
                self.tell(self._progress("begin", 0))
            case Stage():
                self.tell(self._progress(event.name, event.item))
            case Partial():
                self.tell({"type": "partial_image", "item": event.item, "index": event.index, "path": event.path})
            case Step():
                return self._step(event)
        return None

    def _step(self, event: Step) -> int | None:
        step = event.event
        self.num_stages = max(self.num_stages, step.stage + 1)
        part = (step.stage + step.step / max(step.total, step.step, 1)) / self.num_stages if step.total else 0.0
        count = self.order.request.num_images
        percent = min(int(100 * (step.item + min(part, 1.0)) / count), MOST_UNFINISHED)
        has_grown = percent > self.job.progress
        progress = max(percent, self.job.progress)
        news = self._progress("denoise", step.item, step=step.step, total=step.total, progress=progress)
        self.tell({**news, "denoising_stage": step.stage})
        return progress if has_grown else None

    def _progress(self, stage: str, item: int, *, step: int = 0, total: int = 0, progress: int | None = None) -> News:
        return {
            "type": "progress",
            "stage": stage,
            "item": item,
            "step": step,
            "total": total,
            "seconds": round(time.monotonic() - self._begun_s, 3),
            "progress": self.job.progress if progress is None else progress,
        }

"""Jobs on a bench: with a double of the engine, and a real store and storage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from penstock.request import GenerationRequest
from penstock.server.files import Files
from penstock.server.job import Job, new_id
from penstock.server.jobs import Jobs
from penstock.server.metrics import Metrics
from penstock.server.runs import Run
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from penstock.wire import Order
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_job


class Bench:
    """Jobs with a double of the engine, and a real store and storage."""

    def __init__(self, folder: Path, engine: EngineDouble, **settings: Any) -> None:
        self.folder = folder
        self.engine = engine
        self.store = Store(f"sqlite:///{folder}/jobs.db", server="alpha")
        self.files = Files(f"file://{folder}/files", begin=self.store.begin_file, abandon=self.store.abandon_file)
        self.metrics = Metrics(engine)  # type: ignore[arg-type]
        self.jobs = Jobs(
            ServeConfig(**settings),
            engine=engine,  # type: ignore[arg-type]
            store=self.store,
            files=self.files,
            metrics=self.metrics,
            server="alpha",
        )

    async def begin(self, prompt: str = "x", num_images: int = 1, **options: Any) -> Run:
        kind = self.engine.description["kind"]  # type: ignore[index]
        job_id = new_id(kind)
        (self.folder / job_id).mkdir()
        request = GenerationRequest(prompt=prompt, seed=3, num_images=num_images)
        job = a_job(id=job_id, kind=kind, created_at=int(time.time()), prompt=prompt, seed=3)
        return await self.jobs.begin(
            job, Order(id=job_id, request=request, folder=str(self.folder / job_id)), **options
        )

    async def made(self, prompt: str = "x", **options: Any) -> Job:
        run = await self.begin(prompt, **options)
        await run.is_over.wait()
        return run.job

    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "files").iterdir())

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def go(bench: Bench, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run within the life of the jobs."""

    async def whole() -> Any:
        await bench.jobs.start()
        try:
            return await main()
        finally:
            await bench.jobs.stop()

    return asyncio.run(whole())

"""The life cycle of jobs: accepted, followed, kept, recorded, removed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import NotReadyError, QueueFullError
from penstock.request import GenerationRequest
from penstock.server.endings import failure_of
from penstock.server.failures import ApiError
from penstock.server.files import Files, StorageError
from penstock.server.job import Job, new_id
from penstock.server.jobs import Jobs
from penstock.server.metrics import Metrics
from penstock.server.runs import Run
from penstock.server.settings import ServeConfig
from penstock.server.store import Store, StoreError
from penstock.wire import Failure, Order
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_job


class Bench:
    """Jobs with a double of the engine, and a real store and storage."""

    def __init__(self, folder: Path, engine: EngineDouble, **settings: Any) -> None:
        self.folder = folder
        self.engine = engine
        self.store = Store(f"sqlite:///{folder}/jobs.db", server="alpha")
        self.files = Files(f"file://{folder}/files", begin=self.store.begin_file)
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


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with_engine = EngineDouble()
    made = Bench(tmp_path, with_engine)
    yield made
    with_engine.close()
    made.store.close()


def go(bench: Bench, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run within the life of the jobs."""

    async def whole() -> Any:
        await bench.jobs.start()
        try:
            return await main()
        finally:
            await bench.jobs.stop()

    return asyncio.run(whole())


def test_a_job_is_recorded_with_its_files(bench: Bench) -> None:
    async def main() -> Job:
        return await bench.made(num_images=2)

    job = go(bench, main)
    assert (job.status, job.progress, job.size) == ("completed", 100, "64x64")
    assert [file.seed for file in job.results()] == [3, 4]
    assert job.expires_at - job.completed_at == 24 * 3600 and job.started_at is not None
    assert bench.store.get(job.id) == job
    assert bench.kept() == sorted(file.name for file in job.files)
    assert not (bench.folder / job.id).exists()
    assert bench.count("penstock_jobs_total", kind="image", status="completed") == 1
    assert bench.count("penstock_steps_total") == 8 and bench.count("penstock_total_seconds_count") == 1


def test_contents_are_kept_for_those_who_wait(bench: Bench) -> None:
    async def main() -> tuple[Run, Run]:
        with_them, without = await bench.begin(wants_contents=True, num_images=2), await bench.begin()
        await with_them.is_over.wait()
        await without.is_over.wait()
        return with_them, without

    with_them, without = go(bench, main)
    assert sorted(with_them.contents) == [0, 1] and not without.contents


def test_progress_of_a_running_job_is_seen_at_once(bench: Bench) -> None:
    async def main() -> list[Job]:
        bench.engine.gate.clear()
        run = await bench.begin()
        while run.job.status == "queued":
            await asyncio.sleep(0.01)
        seen = [await bench.jobs.get(run.job.id, "ann")]
        listed, _ = await bench.jobs.list("ann", None, limit=5, after=None, order="desc")
        bench.engine.gate.set()
        await run.is_over.wait()
        return [*seen, *listed]

    assert [job.status for job in go(bench, main)] == ["in_progress", "in_progress"]


def test_jobs_of_others_do_not_exist(bench: Bench) -> None:
    async def main() -> list[int]:
        run = await bench.begin()
        statuses = []
        for owner, kind in (("bob", None), ("", None), ("ann", "video")):
            with pytest.raises(ApiError) as caught:
                await bench.jobs.get(run.job.id, owner, kind)
            statuses.append(caught.value.status)
        await run.is_over.wait()
        with pytest.raises(ApiError) as caught:
            await bench.jobs.get(run.job.id, "bob")
        return [*statuses, caught.value.status]

    assert go(bench, main) == [404] * 4


@pytest.mark.parametrize("code", ["out_of_memory", "rank_died", "generation_failed"])
def test_a_failed_job_keeps_no_files(bench: Bench, code: str) -> None:
    bench.engine.failures["boom"] = Failure(code=code, message="why. what to do.")

    async def main() -> Job:
        return await bench.made("boom", num_images=2)

    job = go(bench, main)
    assert (job.status, job.error_code, job.error_message) == ("failed", code, "why. what to do.")
    assert job.progress < 100 and job.files == () and bench.kept() == []
    assert failure_of(job).code == code
    assert bench.count("penstock_failures_total", reason=code) == 1


def test_what_the_queue_refuses_leaves_nothing(bench: Bench) -> None:
    bench.engine.max_queue = 0

    async def main() -> None:
        with pytest.raises(QueueFullError):
            await bench.begin()
        bench.engine.description = None
        with pytest.raises(NotReadyError):
            await bench.jobs.check(GenerationRequest(prompt="x"))
        bench.engine.description = {"kind": "image"}

    go(bench, main)
    assert bench.store.list(None) == ([], False) and bench.jobs.num_unfinished == 0


def test_storage_that_fails_fails_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(path: Path, media_type: str) -> str:
        raise StorageError("no space left on s3://secret")

    monkeypatch.setattr(bench.files, "put", full)

    async def main() -> Job:
        return await bench.made()

    job = go(bench, main)
    assert (job.status, job.error_code) == ("failed", "storage_failed")
    assert "secret" not in (job.error_message or "") and failure_of(job).retry_after_s


def test_a_database_that_fails_at_the_end_is_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    update, is_down = bench.store.update, [True]

    def failing(job_id: str, **values: Any) -> Job | None:
        if is_down[0]:
            raise StoreError("it is away")
        return update(job_id, **values)

    monkeypatch.setattr(bench.store, "update", failing)

    async def main() -> tuple[Job, Job | None]:
        job = await bench.made()
        behind = bench.store.get(job.id)
        assert (await bench.jobs.get(job.id, "ann")).status == "completed"  # it is known by heart
        is_down[0] = False
        return job, behind

    job, behind = go(bench, main)
    assert behind is not None and behind.status == "queued"
    assert bench.store.get(job.id) == job  # the end of the server was the last chance to write it down


def test_a_database_that_fails_at_the_beginning_accepts_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Job) -> None:
        raise StoreError("it is away")

    monkeypatch.setattr(bench.store, "create", failing)

    async def main() -> None:
        with pytest.raises(StoreError):
            await bench.begin()
        while bench.jobs.num_unfinished:
            await asyncio.sleep(0.01)

    go(bench, main)
    assert bench.kept() == []


def test_delete_waits_until_the_ranks_have_let_go(bench: Bench) -> None:
    async def main() -> list[Any]:
        bench.engine.gate.clear()
        bench.engine.letting_go.clear()
        run = await bench.begin()
        deleting = asyncio.create_task(bench.jobs.delete(run.job))
        done, _ = await asyncio.wait({deleting}, timeout=0.3)
        seen: list[Any] = [bool(done), bench.store.get(run.job.id) is not None]
        bench.engine.letting_go.set()
        await deleting
        return [*seen, bench.store.get(run.job.id), run.job.error_code]

    assert go(bench, main) == [False, True, None, "cancelled"]
    assert bench.count("penstock_cancels_total", reason="deleted") == 1


def test_delete_of_a_queued_job(bench: Bench) -> None:
    async def main() -> tuple[Any, int]:
        bench.engine.gate.clear()
        first, second = await bench.begin("first"), await bench.begin("second")
        while first.job.status == "queued":
            await asyncio.sleep(0.01)
        position = bench.jobs.position(second.job)
        deleting = asyncio.create_task(bench.jobs.delete(second.job))
        bench.engine.gate.set()
        await deleting
        await first.is_over.wait()
        return position, len(bench.kept())

    assert go(bench, main) == ((0, 0.0), 1)


def test_delete_of_a_finished_job_removes_files_and_record(bench: Bench) -> None:
    async def main() -> Job:
        job = await bench.made()
        assert bench.kept()
        await bench.jobs.delete(job)
        return job

    job = go(bench, main)
    assert bench.kept() == [] and bench.store.get(job.id) is None


def test_another_servers_unfinished_job_is_not_ours_to_cancel(bench: Bench) -> None:
    theirs = a_job(server="beta")
    bench.store.create(theirs)

    async def main() -> int:
        with pytest.raises(ApiError) as caught:
            await bench.jobs.delete(theirs)
        return caught.value.status

    assert go(bench, main) == 409 and bench.store.get(theirs.id) is not None


def test_stop_fails_what_runs_and_takes_nothing_new(bench: Bench) -> None:
    async def main() -> tuple[Run, Run]:
        bench.engine.gate.clear()
        running, waiting = await bench.begin(), await bench.begin()
        await bench.jobs.stop()
        with pytest.raises(ApiError) as caught:
            await bench.begin()
        assert caught.value.status == 503 and caught.value.retry_after_s
        return running, waiting

    for run in go(bench, main):
        record = bench.store.get(run.job.id)
        assert record is not None and (record.status, record.error_code) == ("failed", "server_stopped")
    assert bench.engine.is_closed


def test_a_stop_does_not_wait_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.jobs.STOP_S", 0.1)
    monkeypatch.setattr(bench.engine, "close", lambda: None)  # its last words never come
    monkeypatch.setattr(bench.engine, "cancel", lambda order_id: None)

    async def main() -> Run:
        bench.engine.gate.clear()
        run = await bench.begin()
        await bench.jobs.stop()
        return run

    run = go(bench, main)
    record = bench.store.get(run.job.id)
    assert record is not None and record.error_code == "server_stopped"
    monkeypatch.undo()


def test_a_restart_fails_what_was_under_way_and_keeps_the_rest(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/jobs.db", server="alpha")
    lost, done, theirs = a_job(), a_job(status="completed", progress=100), a_job(server="beta")
    for job in (lost, done, theirs):
        store.create(job)
    store.close()
    engine = EngineDouble()
    bench = Bench(tmp_path, engine)

    async def main() -> list[Job]:
        return [await bench.jobs.get(job.id, "ann") for job in (lost, done, theirs)]

    found = go(bench, main)
    assert [job.status for job in found] == ["failed", "completed", "queued"]
    assert found[0].error_code == "server_restarted" and found[0].expires_at
    bench.store.close()


def test_expired_jobs_go_with_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.jobs.SWEEP_S", 0.05)
    bench = Bench(tmp_path, EngineDouble(), ttl_s=1)

    async def main() -> Job:
        job = await bench.made()
        assert bench.kept()
        while bench.store.get(job.id) is not None:
            await asyncio.sleep(0.05)
        return job

    go(bench, main)
    assert bench.kept() == []
    bench.store.close()


def test_a_defect_in_following_ends_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Run, event: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Run, "advance", broken)

    async def main() -> Job:
        return await asyncio.wait_for(bench.made(), 20)

    job = go(bench, main)
    assert (job.status, job.error_code) == ("failed", "internal_error")
    record = bench.store.get(job.id)
    assert record is not None and record.status == "failed"

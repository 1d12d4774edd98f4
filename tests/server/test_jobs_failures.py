"""Jobs where something fails: the storage, the database, the engine, another server, penstock itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.server.database import BEGUN
from penstock.server.endings import failure_of
from penstock.server.failures import ApiError
from penstock.server.files import StorageError
from penstock.server.job import Job
from penstock.server.runs import Run
from penstock.server.store import Store, StoreError
from penstock.wire import Failure
from tests.server.bench import Bench, go
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_job


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with_engine = EngineDouble()
    made = Bench(tmp_path, with_engine)
    yield made
    with_engine.close()
    made.store.close()


def test_jobs_of_a_dead_server_of_another_name_fail_at_the_start(tmp_path: Path) -> None:
    beta = Store(f"sqlite:///{tmp_path}/jobs.db", server="beta")
    beta.fail_unfinished("server_restarted", "it runs")
    theirs = a_job(server="beta")
    beta.create(theirs)
    beta.close()  # as its death would
    bench = Bench(tmp_path, EngineDouble())

    async def main() -> Job:
        return await bench.jobs.get(theirs.id, "ann")

    found = go(bench, main)
    assert (found.status, found.error_code) == ("failed", "server_died") and found.expires_at
    bench.store.close()


def test_delete_keeps_the_record_where_the_storage_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = bench.files.delete

    async def failing(name: str) -> None:
        raise StorageError("it is away")

    async def main() -> Job:
        job = await bench.made()
        monkeypatch.setattr(bench.files, "delete", failing)
        with pytest.raises(StorageError):
            await bench.jobs.delete(job)
        assert bench.store.get(job.id) == job and bench.kept()
        monkeypatch.setattr(bench.files, "delete", delete)
        await bench.jobs.delete(job)
        return job

    job = go(bench, main)
    assert bench.store.get(job.id) is None and bench.kept() == []


def test_files_of_a_failed_job_leave_no_word_of_them(bench: Bench) -> None:
    bench.engine.failures["boom"] = Failure(code="out_of_memory", message="why.")

    async def main() -> None:
        run = await bench.begin("x", num_images=2)
        await run.is_over.wait()
        await bench.made("boom")
        bench.engine.gate.clear()
        run = await bench.begin("late", num_images=2)
        bench.store.update(run.job.id, status="failed")  # as another server would that takes this one for dead
        bench.engine.gate.set()
        await run.is_over.wait()

    go(bench, main)
    with bench.store._database.reading() as connection:
        assert connection.execute(sa.select(BEGUN)).all() == []
    assert len(bench.kept()) == 2


def test_an_engine_that_has_failed_for_good_ends_its_jobs_and_the_server(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.server.jobs.STOP_S", 0.1)
    monkeypatch.setattr("penstock.server.upkeep.WATCH_S", 0.02)

    async def main() -> list[Run]:
        bench.engine.gate.clear()
        runs = [await bench.begin(), await bench.begin()]
        assert bench.jobs.problem is None
        bench.engine.state = "failed"
        for run in runs:
            await asyncio.wait_for(run.is_over.wait(), 20)
        while bench.jobs.problem is None:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as caught:
            await bench.begin()
        assert caught.value.status == 503 and caught.value.retry_after_s
        return runs

    for run in go(bench, main):
        record = bench.store.get(run.job.id)
        assert record is not None and (record.status, record.error_code) == ("failed", "rank_died")
        assert not (bench.folder / run.job.id).exists()
    assert "no ranks run any more" in str(bench.jobs.problem)


@pytest.mark.parametrize("is_saving", [False, True])
def test_a_job_that_was_given_up_keeps_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_saving: bool
) -> None:
    put = bench.files.put

    async def main() -> Run:
        saving, going_on = asyncio.Event(), asyncio.Event()
        upkeep = asyncio.all_tasks()

        async def slow(path: Path, media_type: str) -> str:
            name = await put(path, media_type)
            saving.set()
            await going_on.wait()
            return name

        monkeypatch.setattr(bench.files, "put", slow)
        bench.engine.gate.clear()
        run = await bench.begin()
        if is_saving:
            bench.engine.gate.set()
            await saving.wait()
        bench.jobs._give_up(run, Failure(code="rank_died", message="no ranks run any more."))
        while Path(run.order.folder).exists():
            await asyncio.sleep(0.01)
        Path(run.order.folder).mkdir()
        bench.engine.gate.set()  # and now it ends as if nothing had been
        going_on.set()
        await asyncio.wait(asyncio.all_tasks() - upkeep, timeout=1)  # some tasks of the bench never end
        return run

    run = go(bench, main)
    record = bench.store.get(run.job.id)
    assert record is not None and (record.status, record.error_code) == ("failed", "rank_died") and record == run.job
    assert bench.kept() == []


def test_a_defect_in_following_ends_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Run, event: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Run, "advance", broken)

    async def main() -> Job:
        return await asyncio.wait_for(bench.made(), 20)

    job = go(bench, main)
    assert (job.status, job.error_code) == ("failed", "internal_error")
    assert not (bench.folder / job.id).exists()
    record = bench.store.get(job.id)
    assert record is not None and record.status == "failed"


def test_storage_that_fails_fails_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(path: Path, media_type: str) -> str:
        raise StorageError("no space left on s3://secret")

    monkeypatch.setattr(bench.files, "put", full)

    async def main() -> Job:
        return await bench.made()

    job = go(bench, main)
    assert (job.status, job.error_code) == ("failed", "storage_failed")
    assert "secret" not in (job.error_message or "") and failure_of(job).retry_after_s is None


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

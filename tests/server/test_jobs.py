"""The life cycle of jobs: accepted, followed, kept, recorded, removed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import NotReadyError, QueueFullError
from penstock.request import GenerationRequest
from penstock.server.endings import failure_of
from penstock.server.failures import ApiError
from penstock.server.job import Job
from penstock.server.runs import Run
from penstock.server.store import Store
from penstock.wire import Failure
from tests.server.bench import Bench, go
from tests.server.browser import Turnstile
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_job


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with_engine = EngineDouble()
    made = Bench(tmp_path, with_engine)
    yield made
    with_engine.close()
    made.store.close()


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
    theirs, beta = a_job(server="beta"), Store(f"sqlite:///{bench.folder}/jobs.db", server="beta")
    beta.fail_unfinished("server_restarted", "it runs")
    bench.store.create(theirs)

    async def main() -> int:
        with pytest.raises(ApiError) as caught:
            await bench.jobs.delete(theirs)
        return caught.value.status

    assert go(bench, main) == 409 and bench.store.get(theirs.id) is not None
    beta.close()


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
    beta = Store(f"sqlite:///{tmp_path}/jobs.db", server="beta")
    beta.fail_unfinished("server_restarted", "it runs", expires_at=None)
    theirs = a_job(server="beta")
    beta.create(theirs)
    engine = EngineDouble()
    bench = Bench(tmp_path, engine)

    async def main() -> list[Job]:
        return [await bench.jobs.get(job.id, "ann") for job in (lost, done, theirs)]

    found = go(bench, main)
    assert [job.status for job in found] == ["failed", "completed", "queued"]
    assert found[0].error_code == "server_restarted" and found[0].expires_at
    bench.store.close()
    beta.close()


def test_expired_jobs_go_with_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.upkeep.SWEEP_S", 0.05)
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


@pytest.mark.parametrize("moment", ["while it is recorded", "before"])
def test_who_asks_and_is_cancelled_leaves_no_run_that_nobody_follows(
    bench: Bench, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, recording, go_on = bench.store.create, threading.Event(), threading.Event()

    def slow(job: Job) -> None:
        recording.set()
        assert go_on.wait(20)
        create(job)

    monkeypatch.setattr(bench.store, "create", slow)
    bench.engine.gate.clear()

    async def main() -> None:
        asking = asyncio.create_task(bench.begin())
        while not (recording.is_set() if moment != "before" else bench.jobs.num_unfinished):
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert bench.jobs.num_unfinished == 1  # followed until its ranks have let go
        go_on.set()
        async with asyncio.timeout(20):
            while bench.jobs.num_unfinished:
                await asyncio.sleep(0.01)

    go(bench, main)
    (job,), _ = bench.store.list(None)
    assert (job.status, job.error_code) == ("failed", "cancelled")
    assert not (bench.folder / job.id).exists()


def test_what_is_finished_of_a_stopped_job_stays(bench: Bench) -> None:
    gate = bench.engine.gate = Turnstile()

    async def main() -> Job:
        run = await bench.begin(num_images=3)
        with run.listening() as feed:
            gate.let(5)  # the first, and a step of the second
            while (await feed.get())["type"] != "kept":
                continue
            return await bench.jobs.end(run.job, "stopped")

    job = go(bench, main)
    assert (job.status, job.error_code) == ("failed", "cancelled")
    record = bench.store.get(job.id)
    assert record is not None and len(record.files) == 1 and record.files == job.files
    assert bench.kept() == sorted(file.name for file in job.files)

"""What has had its time goes, file and record together; what cannot go keeps its record."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.server.expiry import Swept, sweep
from penstock.server.files import Files, StorageError
from penstock.server.job import Job
from penstock.server.store import Store
from tests.server.jobs import a_file, a_job


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url, server="alpha")
    yield store
    store.close()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(f"file://{tmp_path}/files")


def kept(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "files").iterdir()}


def finished(store: Store, files: Files, tmp_path: Path, ended: int, *sizes: int, status: str = "completed") -> Job:
    """A job that ended at a time, expires 100 later, and has files of these sizes."""
    job = a_job()
    store.create(job)
    made = []
    for size in sizes:
        (tmp_path / "source").write_bytes(bytes(size))
        name = asyncio.run(files.put(tmp_path / "source", "image/png"))
        made.append(a_file(name, size))
    values = {"status": status, "completed_at": ended, "expires_at": ended + 100}
    done = store.update(job.id, files=tuple(made), **values)
    assert done is not None
    return done


def swept(store: Store, files: Files, now: int, max_bytes: int = 10**9) -> Swept:
    return asyncio.run(sweep(store, files, now, max_bytes))


def names(*jobs: Job) -> set[str]:
    return {file.name for job in jobs for file in job.files}


def test_the_expired_go_file_and_record_together(store: Store, files: Files, tmp_path: Path) -> None:
    old = finished(store, files, tmp_path, 10, 5, 6)
    failed = finished(store, files, tmp_path, 10, status="failed")
    young = finished(store, files, tmp_path, 20, 7)
    waiting = a_job()
    store.create(waiting)
    assert swept(store, files, 109) == Swept(failures=[])
    result = swept(store, files, 110)
    assert result == Swept(num_expired=2, num_bytes=11, failures=[])
    assert store.get(old.id) is None and store.get(failed.id) is None
    assert store.get(young.id) == young and store.get(waiting.id) == waiting
    assert kept(tmp_path) == names(young)


def test_a_missing_file_is_fine(store: Store, files: Files, tmp_path: Path) -> None:
    old = finished(store, files, tmp_path, 10, 5)
    asyncio.run(files.delete(old.files[0].name))
    assert swept(store, files, 200).num_expired == 1
    assert store.get(old.id) is None


@pytest.mark.parametrize(("max_bytes", "num_left"), [(60, 3), (59, 2), (50, 2), (49, 1), (30, 1), (29, 0), (0, 0)])
def test_the_oldest_make_room_and_no_more_than_needed(
    store: Store, files: Files, tmp_path: Path, max_bytes: int, num_left: int
) -> None:
    jobs = [finished(store, files, tmp_path, ended, size) for ended, size in ((20, 20), (10, 10), (30, 30))]
    empty = finished(store, files, tmp_path, 1, status="failed")
    result = swept(store, files, 50, max_bytes)
    by_age = [jobs[1], jobs[0], jobs[2]]
    left = by_age[3 - num_left :]
    assert result.num_pressed_out == 3 - num_left and result.num_expired == 0
    assert kept(tmp_path) == names(*left)
    assert [store.get(job.id) is not None for job in by_age] == [job in left for job in by_age]
    assert store.get(empty.id) == empty  # it would make no room
    assert store.total_bytes() <= max_bytes


def test_what_runs_is_never_removed(store: Store, files: Files, tmp_path: Path) -> None:
    running = a_job()
    store.create(running)
    store.update(running.id, status="in_progress", files=(a_file("a" * 32, 1000),), expires_at=1)
    done = finished(store, files, tmp_path, 10, 5)
    assert swept(store, files, 50, 100).num_pressed_out == 1
    assert store.get(done.id) is None and store.get(running.id) is not None


class Stubborn:
    """A storage that will not give up some files."""

    def __init__(self, stuck: set[str]) -> None:
        self.stuck = stuck
        self.deleted: list[str] = []

    async def delete(self, name: str) -> None:
        if name in self.stuck:
            raise StorageError("access denied")
        self.deleted.append(name)

    async def remove_leftovers(self) -> int:
        raise StorageError("no listing")


def test_a_file_that_stays_keeps_its_record_and_no_other(store: Store, files: Files, tmp_path: Path) -> None:
    stuck = finished(store, files, tmp_path, 10, 5)
    others = [finished(store, files, tmp_path, 11 + ended, 5) for ended in range(3)]
    storage = Stubborn(names(stuck))
    result = asyncio.run(sweep(store, storage, 50, 9))
    assert result.num_pressed_out == 3 and store.get(stuck.id) == stuck
    assert [store.get(job.id) for job in others] == [None] * 3
    assert len(result.failures) == 2 and stuck.id in result.failures[0] and "no listing" in result.failures[1]
    storage.stuck.clear()
    assert asyncio.run(sweep(store, storage, 200, 9)).num_expired == 1
    assert store.get(stuck.id) is None


def test_files_of_no_job_go_once_their_server_is_back(database_url: str, tmp_path: Path) -> None:
    former = Store(database_url, server="alpha")
    former.fail_unfinished("server_restarted", "the first start")
    files = Files(f"file://{tmp_path}/files", begin=former.begin_file)
    (tmp_path / "source").write_bytes(b"12345")
    orphan = asyncio.run(files.put(tmp_path / "source", "image/png"))
    done = finished(former, files, tmp_path, 10, 5)
    assert swept(former, files, 50).num_orphans == 0
    former.close()  # as if it had died before it recorded the orphan
    store = Store(database_url, server="alpha")
    store.fail_unfinished("server_restarted", "the next start")
    assert kept(tmp_path) == {orphan} | names(done)
    assert swept(store, files, 50).num_orphans == 1
    assert kept(tmp_path) == names(done)
    assert swept(store, files, 50).num_orphans == 0
    store.close()


def test_many_sweep_at_once(store: Store, files: Files, tmp_path: Path) -> None:
    for ended in range(10):
        finished(store, files, tmp_path, ended, 5)

    async def all_of_them() -> list[Swept]:
        return await asyncio.gather(*(sweep(store, files, 50, 20) for _ in range(4)))

    results = asyncio.run(all_of_them())
    assert not any(result.failures for result in results)
    assert sum(result.num_bytes for result in results) == 50 - store.total_bytes()
    assert {name for job in store.list(None)[0] for name in names(job)} == kept(tmp_path)
    assert store.total_bytes() <= 20

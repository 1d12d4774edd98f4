"""Jobs are recorded, once and for all: states, owners, pages, many at once, and a process killed while it writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.server.job import Job
from penstock.server.store import Store, StoreError, UnknownJobError
from tests import processes
from tests.server.jobs import a_file, a_job

WRITE = """
import sys
from penstock.server.job import Job, new_id
from penstock.server.store import Store
store = Store(sys.argv[1], server="writer")
store.fail_unfinished("server_restarted", "a former one")
while True:
    job = Job(id=new_id("image"), kind="image", owner="ann", server="writer", model="demo", created_at=1)
    store.create(job)
    print("created", job.id, flush=True)
    store.update(job.id, status="in_progress", progress=30)
    print("begun", job.id, flush=True)
    if job.id[-1] in "01234567":
        store.update(job.id, status="completed", completed_at=2)
        print("completed", job.id, flush=True)
"""

Open = Callable[..., Store]


@pytest.fixture
def open_store(database_url: str) -> Iterator[Open]:
    opened: list[Store] = []

    def open_one(server: str = "alpha") -> Store:
        opened.append(Store(database_url, server=server))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


def test_a_job_comes_back_as_it_was_whatever_the_client_wrote(open_store: Open) -> None:
    odd = "nul \x00, a lone surrogate \ud800, \U0001f98a, ' \" \\"
    job = a_job(
        kind="video",
        model=odd,
        prompt=odd,
        seconds="4",
        size="64x32",
        seed=2**63 - 1,
        arguments={odd: [odd, None, 1.5, {"a": True}]},
        remixed_from="video_0",
        started_at=1000.25,
        error_message=odd,
        files=(a_file("a.png", 2**40, facts={"width": 64, "height": None}), a_file("b.webp", role="thumbnail", seed=3)),
        timings={"total_s": 1.25},
    )
    open_store().create(job)
    assert open_store("beta").get(job.id) == job


def test_the_defaults_of_a_job_come_back(store: Store) -> None:
    job = a_job()
    store.create(job)
    assert store.get(job.id) == job


def test_two_jobs_of_one_id_are_refused(store: Store) -> None:
    job = a_job()
    store.create(job)
    with pytest.raises(StoreError, match="failed"):
        store.create(job)


@pytest.mark.parametrize("id", ["", "image_0", "\x00", "\ud800", "x" * 100_000, "' OR 1=1 --"])
def test_an_id_that_is_none_has_no_job(store: Store, id: str) -> None:
    store.create(a_job())
    assert store.get(id) is None
    assert not store.delete(id) if id.isprintable() and id.isascii() else True


def test_owners_do_not_see_each_other(store: Store) -> None:
    mine, other = a_job(), a_job(owner="bob")
    store.create(mine)
    store.create(other)
    assert store.get(other.id, "ann") is None and store.get(other.id, "bob") == other and store.get(other.id) == other
    assert store.list("ann") == ([mine], False)
    assert store.list("nobody") == ([], False)
    assert {job.id for job in store.list(None)[0]} == {mine.id, other.id}
    with pytest.raises(UnknownJobError):
        store.list("ann", after=other.id)


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_nothing_leaves_an_end(store: Store, status: str) -> None:
    job = a_job()
    store.create(job)
    assert store.update(job.id, status="in_progress", started_at=1.5) is not None
    ended = store.update(job.id, status=status, completed_at=2)
    assert ended is not None and ended.status == status and ended.started_at == 1.5
    for values in ({"status": "completed"}, {"status": "failed"}, {"status": "in_progress"}, {"progress": 50}):
        assert store.update(job.id, **values) is None
    assert store.get(job.id) == ended


def test_what_began_is_not_queued_again(store: Store) -> None:
    job = a_job()
    store.create(job)
    assert store.update(job.id, status="queued") == job
    store.update(job.id, status="in_progress")
    assert store.update(job.id, status="queued") is None
    assert store.get(job.id).status == "in_progress"  # type: ignore[union-attr]


def test_progress_never_goes_back_and_reaches_100_only_at_the_end(store: Store) -> None:
    job = a_job()
    store.create(job)

    def progress_after(**values: Any) -> int:
        changed = store.update(job.id, **values)
        assert changed is not None
        return changed.progress

    assert [progress_after(progress=value) for value in (10, 40, 20, 40, 100, 7)] == [10, 40, 40, 40, 99, 99]
    assert progress_after(status="completed", progress=3) == 100


def test_a_failed_job_keeps_the_progress_it_had(store: Store) -> None:
    job = a_job()
    store.create(job)
    store.update(job.id, status="in_progress", progress=40)
    failed = store.update(job.id, status="failed", error_code="out_of_memory", error_message="9 GiB", progress=100)
    assert failed is not None and failed.error_code == "out_of_memory"
    assert store.update("image_0", progress=1) is None
    assert failed.progress < 100


@pytest.mark.parametrize("values", [{}, {"colour": 1}, {"owner": "bob"}, {"created_at": 1}])
def test_a_field_that_never_changes_is_refused(store: Store, values: dict[str, Any]) -> None:
    job = a_job()
    store.create(job)
    with pytest.raises(ValueError, match="no fields of a job that change"):
        store.update(job.id, **values)
    assert store.get(job.id) == job


def test_pages_neither_repeat_nor_skip(store: Store) -> None:
    jobs = [a_job(created_at=1000 + index // 4, kind="video" if index % 2 else "image") for index in range(20)]
    for job in jobs:
        store.create(job)

    def pages(size: int, **options: Any) -> Iterator[Job]:
        after = None
        while True:
            page, more = store.list("ann", limit=size, after=after, **options)
            yield from page
            assert len(page) == size or not more
            if not more:
                return
            after = page[-1].id

    for size in (1, 3, 10, 19, 20, 21):
        assert list(pages(size)) == jobs[::-1]
        assert list(pages(size, order="asc")) == jobs
        assert list(pages(size, kind="video")) == jobs[::-2]
    with pytest.raises(UnknownJobError, match="after='image_0' is no job"):
        store.list("ann", after="image_0")
    with pytest.raises(UnknownJobError):
        store.list("ann", after="\x00")
    with pytest.raises(LookupError):
        store.list("ann", kind="video", after=jobs[0].id)


def test_a_page_goes_on_though_jobs_come_and_go(store: Store) -> None:
    jobs = [a_job() for _ in range(6)]
    for job in jobs:
        store.create(job)
    first, more = store.list("ann", limit=2)
    assert more and first == [jobs[5], jobs[4]]
    store.create(a_job())
    store.delete(jobs[3].id)
    assert store.list("ann", limit=2, after=first[-1].id) == ([jobs[2], jobs[1]], True)


def test_a_restart_fails_what_the_server_was_at_and_nothing_else(open_store: Open) -> None:
    alpha = open_store()
    queued, running, done, others = a_job(), a_job(), a_job(), a_job(server="beta")
    for job in (queued, running, done, others):
        alpha.create(job)
    alpha.update(running.id, status="in_progress", progress=40, files=(a_file("a.png"),))
    alpha.update(done.id, status="completed", completed_at=5)
    assert alpha.fail_unfinished("server_restarted", "the server ended", expires_at=77) == 2
    assert alpha.fail_unfinished("server_restarted", "the server ended") == 0
    for job in (queued, running):
        failed = alpha.get(job.id)
        assert failed is not None and failed.status == "failed" and failed.error_code == "server_restarted"
        assert failed.error_message == "the server ended" and failed.expires_at == 77 and failed.completed_at
    assert [file.name for file in alpha.get(running.id).files] == ["a.png"]  # type: ignore[union-attr]
    assert alpha.get(done.id).status == "completed"  # type: ignore[union-attr]
    assert alpha.get(others.id) == others
    with pytest.raises(ConfigError, match="--server-name"):
        open_store().fail_unfinished("server_restarted", "a second one of the same name")
    assert open_store("beta").fail_unfinished("server_restarted", "the server ended") == 1


def test_expiry_and_the_cap_look_at_what_has_ended(store: Store) -> None:
    early, late, big, empty, running = (a_job() for _ in range(5))
    for job in (early, late, big, empty, running):
        store.create(job)
    assert store.total_bytes() == 0
    store.update(late.id, status="completed", completed_at=20, expires_at=120, files=(a_file("l", 5), a_file("m", 6)))
    store.update(early.id, status="completed", completed_at=10, expires_at=110, files=(a_file("e", 7),))
    store.update(big.id, status="failed", completed_at=30, expires_at=130, files=(a_file("b", 2**41),))
    store.update(empty.id, status="failed", completed_at=1, expires_at=101)
    store.update(running.id, status="in_progress", expires_at=1, files=(a_file("r", 100),))
    assert [job.id for job in store.expired(119)] == [early.id, empty.id]
    assert [job.id for job in store.expired(100)] == []
    assert [job.id for job in store.expired(120)] == [early.id, late.id, empty.id]
    assert store.total_bytes() == 2**41 + 118
    assert [job.id for job in store.oldest_finished(10)] == [early.id, late.id, big.id]
    assert [job.id for job in store.oldest_finished(1)] == [early.id]
    assert store.delete(big.id) and not store.delete(big.id)
    assert store.total_bytes() == 118


def test_a_file_that_was_begun_in_a_former_life_is_known_until_it_is_forgotten(open_store: Open) -> None:
    former = open_store()
    job = a_job()
    former.create(job)
    former.fail_unfinished("server_restarted", "the first start")
    job = a_job()
    former.create(job)
    for name in ("kept", "lost", "late"):
        former.begin_file(name)
    assert former.update(job.id, files=(a_file("kept"),)) is not None
    assert former.begun_files() == []  # they may yet come to a job
    former.close()
    store, other = open_store(), open_store("beta")
    other.fail_unfinished("server_restarted", "another server")
    assert store.begun_files() == [] == other.begun_files()  # as long as the former may live
    store.fail_unfinished("server_restarted", "the next start")
    store.begin_file("new")
    assert store.begun_files() == ["late", "lost"] and other.begun_files() == []
    assert store.update(job.id, files=(a_file("late"),)) is None
    store.forget_files(["lost", "gone"])
    store.forget_files([])
    assert store.begun_files() == ["late"]


def test_dead_servers_jobs_fail_and_their_files_are_taken_over(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.server.database._GRACE_S", 0.0)
    alpha, beta, dead = open_store(), open_store("beta"), open_store("dead")
    for store in (alpha, beta, dead):
        store.fail_unfinished("server_restarted", "it runs")
    mine, theirs, lost = a_job(), a_job(server="beta"), a_job(server="dead")
    for store, job in ((alpha, mine), (beta, theirs), (dead, lost)):
        store.create(job)
        store.begin_file(job.server)
    assert alpha.fail_dead("server_died", "it has ended", expires_at=7) == 0
    dead.close()
    while not (count := alpha.fail_dead("server_died", "it has ended", expires_at=7)):
        time.sleep(0.01)  # PostgreSQL takes a moment to see that a session has ended
    assert count == 1
    assert alpha.fail_dead("server_died", "it has ended") == 0
    failed = alpha.get(lost.id)
    assert failed is not None and (failed.status, failed.error_code, failed.expires_at) == ("failed", "server_died", 7)
    assert alpha.get(mine.id) == mine and alpha.get(theirs.id) == theirs
    assert alpha.begun_files() == ["dead"] and beta.begun_files() == []


def test_a_server_without_a_lease_for_a_moment_is_not_dead(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha, beta = Store(postgres_url, server="alpha"), Store(postgres_url, server="beta")
    alpha.fail_unfinished("server_restarted", "it runs")
    job = a_job(server="beta")
    beta.create(job)
    assert alpha.fail_dead("server_died", "x") == 0  # its session may have ended, and not itself
    monkeypatch.setattr("penstock.server.database._GRACE_S", 0.0)
    assert alpha.fail_dead("server_died", "x") == 1
    alpha.close()
    beta.close()


def test_a_file_that_is_abandoned_is_known_at_once(store: Store) -> None:
    for name in ("a", "b"):
        store.begin_file(name)
    store.abandon_file("b")
    assert store.begun_files() == ["b"]
    store.forget_files(["b"])
    assert store.begun_files() == []


def test_numbers_that_are_none_do_not_keep_a_job_from_its_record(store: Store) -> None:
    job = a_job(arguments={"guidance_scale": float("nan"), "sigmas": [1.0, float("inf")]})
    store.create(job)
    store.update(job.id, status="completed", timings={"total_s": float("nan")})
    found = store.get(job.id)
    assert found is not None and found.arguments == {"guidance_scale": None, "sigmas": [1.0, None]}
    assert found.timings == {"total_s": None}


def test_of_many_threads_and_servers_one_ends_a_job(open_store: Open) -> None:
    stores = [open_store(), open_store("beta")]
    jobs = [a_job() for _ in range(30)]
    for job in jobs:
        stores[0].create(job)

    def end(number: int) -> list[str]:
        status = "completed" if number % 2 else "failed"
        ends = (stores[number % 2].update(job.id, status=status, error_code=str(number)) for job in jobs)
        return [job.id for job in ends if job]

    with ThreadPoolExecutor(16) as pool:
        ended = [id for ids in pool.map(end, range(16)) for id in ids]
    assert sorted(ended) == sorted(job.id for job in jobs)


def test_progress_of_many_threads_is_the_highest(store: Store) -> None:
    job = a_job()
    store.create(job)
    with ThreadPoolExecutor(16) as pool:
        seen = list(pool.map(lambda value: store.update(job.id, progress=value), [7 * n % 97 for n in range(200)]))
    assert all(seen) and store.get(job.id).progress == 96  # type: ignore[union-attr]


def test_many_threads_write_and_read_at_once(store: Store) -> None:
    def live(number: int) -> bool:
        job = a_job(owner=f"owner {number}")
        store.create(job)
        for progress in (20, 40, 60):
            store.update(job.id, status="in_progress", progress=progress)
        store.list(job.owner)
        store.update(job.id, status="completed", completed_at=number, files=(a_file(f"{number}.png", number),))
        found = store.get(job.id, job.owner)
        return found is not None and found.progress == 100

    with ThreadPoolExecutor(40) as pool:
        assert all(pool.map(live, range(120)))
    assert store.total_bytes() == sum(range(120))


@pytest.mark.parametrize("num_lines", [1, 2, 57, 300])
def test_a_process_killed_while_it_writes_loses_nothing_it_was_told(
    database_url: str, open_store: Open, num_lines: int
) -> None:
    command = [sys.executable, "-c", WRITE, database_url]
    with processes.Process[str](command, stdout=processes.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(num_lines)]
        writer.kill()
        lines += [line for line in writer.stdout if line.endswith("\n")]
        writer.wait()
    told = dict(line.split()[::-1] for line in lines)
    assert told
    store = open_store("reader")
    allowed = {"created": {"queued", "in_progress"}, "begun": {"in_progress", "completed"}, "completed": {"completed"}}
    for id, state in told.items():
        job = store.get(id)
        assert job is not None and job.status in allowed[state]
    store.create(a_job())
    again = open_store("writer")
    failed = sum(job.status != "completed" for job in again.list("ann", limit=10**6)[0]) - 1
    assert again.fail_unfinished("server_restarted", "the server ended") == failed
    assert {job.status for job in store.list("ann", limit=10**6)[0]} <= {"queued", "completed", "failed"}


def test_a_lost_connection_is_an_error_with_words_and_then_mended(postgres_url: str) -> None:
    store, killer = Store(postgres_url, server="alpha"), Store(postgres_url, server="beta")
    job = a_job()
    store.create(job)
    with killer._database.reading() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert store.get(job.id) == job
    store.close()
    killer.close()
    with pytest.raises(StoreError, match="failed: .*Try again"), store._database.reading() as connection:
        connection.exec_driver_sql("SELECT 1/0")
    store.close()

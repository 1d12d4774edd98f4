"""What a server does by itself, again and again, and what ends it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.engine.status import EngineStatus, GroupStatus
from penstock.errors import EngineError, NotReadyError, PenstockError
from penstock.server.database import LeaseLostError
from penstock.server.files import Files
from penstock.server.logs import logging_to
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from penstock.server.upkeep import Upkeep
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_file, a_job


class Bench:
    """An upkeep, what it keeps up, and what it said of its end."""

    def __init__(self, folder: Path) -> None:
        self.engine = EngineDouble()
        self.store = Store(f"sqlite:///{folder}/jobs.db", server="alpha")
        self.files = Files(f"file://{folder}/files")
        self.problems: list[PenstockError] = []
        self.upkeep = Upkeep(
            ServeConfig(),
            engine=self.engine,  # type: ignore[arg-type]
            store=self.store,
            files=self.files,
            fail=self._fail,
        )

    async def _fail(self, problem: PenstockError) -> None:
        self.problems.append(problem)

    def watch(self, *groups: GroupStatus) -> None:
        status = EngineStatus(groups=[*groups], queue_depth=0, steps_per_s=0.0)
        self.engine.status = lambda: status  # type: ignore[method-assign]
        asyncio.run(self.upkeep.watch_engine())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.engine.close()
    made.store.close()


def group(state: Any, message: str = "", number: int = 0) -> GroupStatus:
    return GroupStatus(number=number, state=state, message=message)


def test_an_engine_ends_the_server_once_no_group_ever_runs_again(bench: Bench) -> None:
    bench.watch(group("failed", "out of luck"), group("restarting", "soon", 1))
    assert bench.problems == []
    bench.watch(group("failed", "the engine is closed."), group("failed", "x", 1))
    (problem,) = bench.problems
    assert isinstance(problem, EngineError) and "the engine is closed. Look at the log" in str(problem)


def test_the_engines_own_word_for_its_end_counts_more(bench: Bench) -> None:
    bench.engine.close()
    bench.engine.require_room = refuse  # type: ignore[method-assign]
    bench.watch(group("failed", "the engine is closed"))
    assert "its thread failed (ZeroDivisionError). Look" in str(bench.problems[0])


def refuse() -> None:
    raise NotReadyError("its thread failed (ZeroDivisionError).")


def test_an_engine_that_never_began_is_told_of_by_whoever_waits_for_it(bench: Bench) -> None:
    bench.engine.description = None
    bench.watch(group("failed", "no such model"))
    assert bench.problems == []


def test_why_ranks_died_is_in_the_log_once(bench: Bench) -> None:
    stream = io.StringIO()
    with logging_to(stream):
        bench.upkeep = Upkeep(
            ServeConfig(),
            engine=bench.engine,  # type: ignore[arg-type]
            store=bench.store,
            files=bench.files,
            fail=bench._fail,
        )
        for state in ("idle", "restarting", "restarting", "idle"):
            bench.watch(group(state, "rank 0 died (exit 1): no /home/ann/model" if state == "restarting" else ""))
    assert stream.getvalue().count("no /home/ann/model") == 1


def test_one_bad_row_does_not_keep_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.upkeep.SWEEP_S", 0.02)
    bad, good = a_job(), a_job()
    for job in (bad, good):
        bench.store.create(job)
        bench.store.update(job.id, status="completed", completed_at=1, expires_at=2, files=(a_file("a" * 32, 5),))
    with bench.store._database.writing() as connection:
        connection.execute(sa.text("UPDATE penstock_jobs SET files = '[{]' WHERE id = :id"), {"id": bad.id})

    async def main() -> None:
        work = asyncio.create_task(bench.upkeep.run())
        while bench.store.get(good.id) is not None:
            await asyncio.sleep(0.01)
        assert not work.done()
        work.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))
    with bench.store._database.reading() as connection:
        assert list(connection.execute(sa.text("SELECT id FROM penstock_jobs")).scalars()) == [bad.id]


def test_what_fails_once_is_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.upkeep.SWEEP_S", 0.02)
    done: list[str] = []

    async def fails() -> None:
        done.append("fails")
        raise ZeroDivisionError

    async def works() -> None:
        done.append("works")

    async def main() -> None:
        work = asyncio.create_task(bench.upkeep.run(fails, works))
        while done.count("works") < 3:
            await asyncio.sleep(0.01)
        work.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert done[:4] == ["fails", "works"] * 2


def test_a_name_that_another_has_taken_ends_the_server(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> bool:
        raise LeaseLostError("another has it")

    asyncio.run(bench.upkeep.hold_name())
    assert bench.problems == []
    monkeypatch.setattr(bench.store, "hold_name", lost)
    asyncio.run(bench.upkeep.hold_name())
    assert isinstance(bench.problems[0], LeaseLostError)

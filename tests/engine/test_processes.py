"""The processes of ranks: as many as a machine can have, each ended with its session."""

from __future__ import annotations

import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed.launcher import LAUNCHER, SECRET, bound
from penstock.engine import rankgroup
from penstock.engine.launch import launch
from penstock.engine.processes import RankProcess, most_ranks, rank_variables, require_startable, start
from penstock.engine.rankgroup import RankGroup, WorkConfig
from penstock.errors import ConfigError
from tests import processes


def test_most_ranks_grow_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2)), raising=False)
    assert most_ranks() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(48)), raising=False)
    assert most_ranks() == 192
    require_startable(192)
    with pytest.raises(ConfigError, match=r"^ring\(193\) = 193 ranks, and this machine starts at most 192: 4 per CPU"):
        require_startable(193, "ring(193)")


def test_ranks_of_one_run_share_a_secret_that_no_other_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "of an outer run")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    one, other = rank_variables(2, 4, 7), rank_variables(2, 4, 7)
    assert len({one[SECRET], other[SECRET], "of an outer run"}) == 3 and len(one[SECRET]) == 64
    assert (one["OMP_NUM_THREADS"], one["WORLD_SIZE"], one["MASTER_PORT"]) == ("2", "2", "7")
    assert one[LAUNCHER] == str(os.getpid())


CHILD = """
import subprocess, sys, time
print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("has_session", [True, False])
def test_what_a_rank_has_started_ends_with_its_session(has_session: bool) -> None:
    with start([sys.executable, "-c", CHILD], os.environ, has_session=has_session, stdout=processes.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        rank = RankProcess(0, process, None, has_session)
        rank.kill()
        process.wait()
        rank.kill()  # nothing the second time
        assert rank.how_it_ended == "signal 9, SIGKILL"
        if has_session:
            processes.await_that(lambda: not processes.is_running(child))
        else:
            assert processes.is_running(child)
            processes.send(child, signal.SIGKILL)


def test_the_last_lines_are_kept() -> None:
    with tempfile.TemporaryFile() as said, processes.Process[bytes](["true"]) as process:
        process.wait()
        rank = RankProcess(0, process, said)
        said.write(b"".join(b"%d\n" % number for number in range(20_000)))
        assert rank.tail().splitlines() == [str(number) for number in range(19_960, 20_000)]
        assert rank.tail(said.tell() - 6) == "19999"
        assert RankProcess(0, process, None).tail() == "" and rank.how_it_ended == "exit 0"


def by_launcher() -> None:
    launch(["sleep", "1000"], 2)


def by_engine() -> None:
    """As an engine does it: in a thread that lives as long as the ranks."""
    rankgroup._WORKER = ("sleep", "1000")
    work = WorkConfig(address="", name="", model="", load=LoadConfig(), parallel=ParallelConfig(ulysses_degree=2))
    threading.Thread(target=lambda: (RankGroup(0, 1, work).start(), time.sleep(1000)), daemon=True).start()
    time.sleep(1000)


def with_mark(starter: Callable[[], None], mark: str) -> Callable[[], None]:
    def act() -> None:
        os.environ[processes.MARK] = mark  # what it starts finds it there
        starter()

    return act


def have_begun(mark: str) -> bool:
    """Whether both ranks are what they were to become."""
    return [Path(f"/proc/{pid}/comm").read_text() for pid in processes.marked(mark)] == ["sleep\n"] * 2


@pytest.mark.parametrize("starter", [by_launcher, by_engine])
def test_no_rank_outlives_who_started_it_whenever_that_is_killed(starter: Callable[[], None]) -> None:
    """Fifty times each, from before the first rank is started until after both have begun."""
    moments, run = random.Random(7), secrets.token_hex(8)
    begun_s = time.monotonic()
    with processes.Fork(with_mark(starter, f"{run}-whole")):
        processes.await_that(lambda: have_begun(f"{run}-whole"))
        whole_s = time.monotonic() - begun_s
    for number in range(50):
        with processes.Fork(with_mark(starter, f"{run}-{number}")) as child:
            time.sleep(moments.uniform(0, 1.2 * whole_s))
            child.kill()
        processes.await_that(lambda: not processes.marked(run))
    assert not processes.marked(run)


@pytest.mark.parametrize("starter", [by_launcher, by_engine])
def test_ranks_that_are_not_bound_outlive_who_started_them(
    starter: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr("penstock.engine.processes.bound", list)
    mark = secrets.token_hex(8)
    try:
        with processes.Fork(with_mark(starter, mark)) as child:
            processes.await_that(lambda: have_begun(mark))
            child.kill()
        assert have_begun(mark)
    finally:
        while left := processes.marked(mark):
            for pid in left:
                processes.send(pid, signal.SIGKILL)


def test_a_command_whose_starter_has_ended_is_not_run(tmp_path: Path) -> None:
    """The race: it ends after the fork, and before the kernel is asked to tell of its end."""
    command = bound(["touch", str(tmp_path / "ran")])
    living = processes.run(command)  # its parent is this very process
    assert living.returncode == 0 and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    ended = processes.run([*command[:4], "999999999", *command[5:]])
    assert ended.returncode == 1 and not (tmp_path / "ran").exists()

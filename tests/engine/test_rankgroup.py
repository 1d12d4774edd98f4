"""The processes of a group: what they are told, and that they are gone when they should be."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest

from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.rankgroup import Rank, RankGroup, WorkConfig, how_it_ended
from tests.processes import Process

WORK = WorkConfig(
    address="ipc:///nowhere", name="", model="demo", load=LoadConfig(), parallel=ParallelConfig(ulysses_degree=2)
)


LAST_WORDS = """
import os, sys, time
sys.stdin.read()
if os.environ["RANK"] == "0":
    time.sleep(100)
print("no room")
sys.exit(3)
"""


class Scripts:
    """Starts a script in place of each rank.

    Attributes:
        script: in Python.
        environments: that ranks were given.
        started: all processes.
    """

    def __init__(self) -> None:
        self.script = "import time; time.sleep(100)"
        self.environments: list[dict[str, str]] = []
        self.started: list[Process[bytes]] = []

    def start(
        self, command: Sequence[str], variables: dict[str, str], *, has_session: bool = False, **options: Any
    ) -> Process[bytes]:
        assert command[-1] == "penstock.engine.worker" and has_session
        self.environments.append(variables)
        self.started.append(Process[bytes]([sys.executable, "-c", self.script], env=variables, **options))
        return self.started[-1]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    scripts = Scripts()
    monkeypatch.setattr("penstock.engine.rankgroup.start", scripts.start)
    with ExitStack() as stack:
        yield scripts
        for process in scripts.started:
            stack.enter_context(process)


def end(group: RankGroup) -> None:
    group.kill()
    group.wait(time.monotonic() + 10)
    assert group.is_gone()


def test_ranks_are_told_who_they_are(processes: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    group = RankGroup(1, 2, WORK)
    group.start()
    environments = processes.environments
    for rank, environment in enumerate(environments):
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["PENSTOCK_GROUPS"]) == (str(rank), "2", "2")
        assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"  # the second group's
    assert "PENSTOCK_LISTENER" in environments[0] and "PENSTOCK_LISTENER" not in environments[1]
    assert [rank.name for rank in group.ranks] == ["1.0.0", "1.0.1"] and group.state == "starting"
    end(group)


def test_killed_ranks_are_gone(processes: Scripts) -> None:
    group = RankGroup(0, 1, WORK)
    group.start()
    started = [rank.process for rank in group.ranks]
    group.fall("why")
    group.wait(time.monotonic() + 10)
    assert group.is_gone() and all(process.returncode == -9 for process in started) and group.ranks == []
    assert group.state == "restarting" and group.message == "why"


def test_each_failure_waits_longer_until_one_works(processes: Scripts) -> None:
    group = RankGroup(0, 1, WORK)
    waits_s = []
    for _ in range(9):
        group.fall("why")
        waits_s.append(group.due_s - time.monotonic())
    assert all(later > earlier * 1.5 for earlier, later in pairwise(waits_s[:7]))
    assert 50 < waits_s[8] <= 60
    group.succeed()
    group.fall("why")
    assert group.due_s - time.monotonic() < 1


def test_names_are_new_after_each_start(processes: Scripts) -> None:
    group = RankGroup(0, 1, WORK)
    names = []
    for _ in range(2):
        group.start()
        names += [rank.name for rank in group.ranks]
        group.fall("")
        end(group)
    assert len(set(names)) == 4 and group.num_restarts == 1


def test_who_died_is_found_with_its_last_words(processes: Scripts) -> None:
    processes.script = LAST_WORDS
    group = RankGroup(0, 1, WORK)
    group.start()
    deadline_s = time.monotonic() + 20
    while (dead := group.first_dead()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert how_it_ended(dead) == "rank 1 died (exit 3): no room"
    end(group)


def talking(processes: Scripts, words: str) -> tuple[RankGroup, Rank]:
    """A group, and its first rank, which has said something and goes on."""
    processes.script = f"print({words!r}, flush=True); import time; time.sleep(100)"
    group = RankGroup(0, 1, WORK)
    group.start()
    rank = group.ranks[0]
    while not rank.tail():
        assert rank.process.poll() is None
        time.sleep(0.01)
    return group, rank


def test_what_was_printed_before_is_not_why_it_died(processes: Scripts) -> None:
    group, rank = talking(processes, "an order failed")
    rank.process.terminate()
    rank.process.wait(10)
    assert how_it_ended(rank) == "rank 0 died (signal 15, SIGTERM): an order failed"
    rank.rest()
    assert how_it_ended(rank) == "rank 0 died (signal 15, SIGTERM)"
    end(group)


def test_who_is_killed_said_nothing_of_it(processes: Scripts) -> None:
    group, rank = talking(processes, "a warning")
    rank.process.kill()
    rank.process.wait(10)
    assert how_it_ended(rank) == "rank 0 died (signal 9, SIGKILL)"
    end(group)


def test_gpus_that_are_switched_off_stay_so(processes: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    group = RankGroup(1, 2, WORK)
    group.start()
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in processes.environments] == ["", ""]
    end(group)


def test_silence_counts_once_a_rank_is_ready(processes: Scripts) -> None:
    group = RankGroup(0, 1, WORK)
    group.start()
    group.ranks[1].heard_s -= 10
    assert group.first_silent(5, 1000) is None  # it loads
    group.ranks[1].heard_s -= 120
    assert group.first_silent(5, 1000) is group.ranks[1]
    group.ranks[1].heard_s += 120
    group.ranks[1].is_ready = True
    silent = group.first_silent(5, 1000)
    assert silent is not None and silent.number == 1 and group.first_silent(15, 1000) is None
    end(group)


def test_a_start_that_fails_half_way_leaves_nothing(processes: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = processes.started

    def second_fails(*arguments: Any, **options: Any) -> Process[bytes]:
        if made:
            raise OSError(11, os.strerror(11))
        return processes.start(*arguments, **options)

    monkeypatch.setattr("penstock.engine.rankgroup.start", second_fails)
    group = RankGroup(0, 1, WORK)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        group.start()
    group.wait(time.monotonic() + 10)
    assert group.is_gone() and made[0].returncode == -9 and group.ranks == []


def test_nobody_waits_for_what_was_killed(processes: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    group = RankGroup(0, 1, WORK)
    group.start()
    rank = group.ranks[0]
    monkeypatch.setattr(rank.process, "poll", lambda: None)  # the system takes its time
    monkeypatch.setattr(rank.process, "wait", lambda *_: pytest.fail("waited"))
    group.fall("why")
    assert not group.is_gone() and not rank.said.closed
    monkeypatch.undo()
    end(group)
    assert rank.said.closed


def test_ranks_are_told_no_secrets(processes: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENSTOCK_API_KEYS", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    group = RankGroup(0, 1, WORK)
    group.start()
    environment = processes.environments[0]
    assert [name for name, value in environment.items() if value == "s3cret"] == ["HF_TOKEN"]
    end(group)


def test_what_was_printed_long_ago_takes_no_room(processes: Scripts) -> None:
    processes.script = f"print('x' * {2**24}, flush=True); import time; time.sleep(0.5); print('last words')"
    group = RankGroup(0, 1, WORK)
    group.start()
    rank = group.ranks[0]
    while os.fstat(rank.said.fileno()).st_size <= 2**24:
        assert rank.process.poll() is None
        time.sleep(0.01)
    rank.forget()
    rank.process.wait(20)
    assert os.fstat(rank.said.fileno()).st_blocks * 512 < 2**20 and rank.tail() == "last words"
    end(group)

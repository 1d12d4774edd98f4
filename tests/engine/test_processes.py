"""The processes of ranks: as many as a machine can have, each ended with its session."""

from __future__ import annotations

import os
import signal
import sys
import tempfile

import pytest

from penstock.distributed.launcher import LAUNCHER, SECRET
from penstock.engine.processes import RankProcess, most_ranks, rank_variables, require_startable, start
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

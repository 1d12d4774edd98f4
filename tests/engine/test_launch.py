"""Ranks as real processes: their exit codes, their last words, and that none is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.launch import launch
from penstock.engine.processes import most_ranks
from penstock.errors import ConfigError
from tests import processes

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
from penstock.distributed.launcher import obey, tell
obey()
rank = int(os.environ["RANK"])
Path(f"started-{rank}").write_text(str(os.getpid()))
def all_started():
    while len(list(Path().glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
HANG = "time.sleep(100)\n"
LAUNCHER = """
import sys
from penstock.engine.launch import launch
code = launch([sys.executable, "rank.py"], int(sys.argv[1]), grace_s=float(sys.argv[2]))
assert "torch" not in sys.modules
sys.exit(code)
"""

Start = Callable[..., "processes.Process[str]"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script: str, num_ranks: int = 2, grace_s: float = 0.5) -> processes.Process[str]:
    """A launcher in a process group of its own, as a terminal has it."""
    Path("rank.py").write_text(PREAMBLE + script)
    return processes.Process[str](
        [sys.executable, "-c", LAUNCHER, str(num_ranks), str(grace_s)],
        stdin=processes.PIPE,
        stdout=processes.PIPE,
        stderr=processes.PIPE,
        text=True,
    )


def run(script: str, num_ranks: int = 2, grace_s: float = 0.5) -> tuple[int, str, str]:
    """(exit code, standard output, standard error); no rank is left."""
    with start(script, num_ranks, grace_s) as process:
        out, err = process.communicate("typed\n", timeout=30)
    assert not alive()
    return process.returncode, out, err


def pids() -> list[int]:
    return [int(text) for path in Path().glob("started-*") if (text := path.read_text())]


def alive() -> list[int]:
    return [pid for pid in pids() if processes.is_running(pid)]


def await_ranks(process: processes.Process[str], num_ranks: int = 2) -> None:
    deadline = time.monotonic() + 30
    while len(pids()) < num_ranks:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_know_who_they_are_and_rank_0_has_the_terminal() -> None:
    code, out, err = run("""
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
Path(f"told-{rank}").write_text(" ".join(os.environ[name] for name in names))
print("out of", rank, sys.stdin.read().strip())
print("err of", rank, file=sys.stderr)
""")
    assert (code, out, err) == (0, "out of 0 typed\n", "err of 0\n")
    share = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert Path("told-0").read_text() == f"0 2 0 2 127.0.0.1 {share}"
    assert Path("told-1").read_text() == f"1 2 1 2 127.0.0.1 {share}"


def test_failing_rank_shows_its_traceback_and_code() -> None:
    code, _, err = run("all_started()\nif rank == 1: raise ValueError('odd')\n" + HANG)
    assert code == 1
    assert err.startswith("rank 1 failed (exit 1):\nTraceback") and err.endswith("ValueError: odd\n")


@pytest.mark.parametrize(("told", "shown"), [("no such thing", ""), ("another", "rank 1 failed (exit 2)")])
def test_what_rank_0_told_is_not_said_again(told: str, shown: str) -> None:
    code, _, err = run(f"""
if rank == 0:
    tell("error: {told}")
    print("error: {told}", file=sys.stderr)
    time.sleep(0.5)
else:
    print("error: no such\\nthing", file=sys.stderr)
sys.exit(2)
""")
    assert code == 2 and err.startswith(f"error: {told}\n{shown}") and err.count("\n") == (1 if not shown else 4)


def test_killed_rank_is_named_with_its_signal() -> None:
    code, _, err = run("all_started()\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + HANG)
    assert code == 137 and err == "rank 1 failed (signal 9, SIGKILL).\n"


def test_ranks_that_hang_end_within_10_s_of_a_failure() -> None:
    begun_s = time.monotonic()
    code, _, err = run(STUBBORN + "all_started()\nif rank == 2: sys.exit(7)\n" + HANG, num_ranks=3, grace_s=3)
    assert code == 7 and err == "rank 2 failed (exit 7).\n"
    assert time.monotonic() - begun_s < 10


def test_ranks_have_time_to_end_by_themselves() -> None:
    code, out, _ = run("all_started()\nif rank == 1: sys.exit(3)\ntime.sleep(1)\nprint('tidied')", grace_s=3)
    assert code == 3 and out == "tidied\n"


def test_killed_launcher_leaves_no_rank() -> None:
    with start(STUBBORN + HANG) as process:
        await_ranks(process)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while alive():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_rank_whose_launcher_is_gone_ends_at_once() -> None:
    Path("rank.py").write_text(PREAMBLE + "print('runs')")
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "PENSTOCK_LAUNCHER": "1"}
    done = processes.run([sys.executable, "rank.py"], env=environ, capture_output=True, check=False, timeout=30)
    assert done.returncode == 1 and done.stdout == b"" == done.stderr


TIDY = """
def leave(number, frame):
    Path(f"tidied-{rank}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, leave)
Path(f"ready-{rank}").touch()
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("number", "is_group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C
        (signal.SIGINT, False, 130),  # kill -INT of the launcher alone
        (signal.SIGTERM, False, 143),
    ],
)
def test_asked_to_end_all_ranks_tidy_up_once(number: signal.Signals, is_group: bool, code: int) -> None:
    with start(TIDY) as process:
        await_ranks(process)
        while len(list(Path().glob("ready-*"))) < 2:
            time.sleep(0.01)
        (os.killpg if is_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code and err == ""
    assert len(list(Path().glob("tidied-*"))) == 2 and not alive()


def test_second_interrupt_kills() -> None:
    with start(STUBBORN + "Path(f'ready-{rank}').touch()\n" + HANG) as process:
        while len(list(Path().glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert len(alive()) == 2
        begun_s = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - begun_s < 2 and not alive()


def test_stubborn_ranks_are_killed_after_one_interrupt() -> None:
    with start(STUBBORN + "Path(f'ready-{rank}').touch()\n" + HANG) as process:
        while len(list(Path().glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130 and not alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_end_while_ranks_are_started(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the third of eight is started: five never are."""
    started: list[processes.Process[bytes]] = []

    def start_one(*arguments: object, **options: Any) -> processes.Process[bytes]:
        started.append(processes.Process[bytes](["sleep", "100"]))
        if len(started) == 3:
            signal.raise_signal(number)
        return started[-1]

    monkeypatch.setattr("penstock.engine.launch.start", start_one)
    assert launch(["any"], 8, grace_s=10) == code
    assert len(started) == 3 and all(process.returncode == -signal.SIGTERM for process in started)


def test_more_ranks_than_a_machine_can_have_are_refused_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start_one(*arguments: object, **options: object) -> None:
        raise Started

    monkeypatch.setattr("penstock.engine.launch.start", start_one)
    most = most_ranks()
    with pytest.raises(ConfigError, match=rf"^{most + 1} ranks, and this machine starts at most {most}: .*Ask for"):
        launch(["any"], most + 1)
    with pytest.raises(ConfigError, match=r"^ulysses\(100000\) = 100000 ranks"):
        launch(["any"], 100_000, equation="ulysses(100000)")
    with pytest.raises(Started):
        launch(["any"], most)


def test_asked_to_end_before_any_rank_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def before_any(num_ranks: int, num_sharing: int, port: int) -> dict[str, str]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    def none(*arguments: object, **options: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("penstock.engine.launch.rank_variables", before_any)
    monkeypatch.setattr("penstock.engine.launch.start", none)
    assert launch([sys.executable, "rank.py"], 2) == 143


def test_ranks_that_outlive_a_failed_one_are_told_that_nobody_interrupted_them() -> None:
    code, out, _ = run("""
def leave(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(1)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, leave)
all_started()
if rank == 1:
    sys.exit(3)
time.sleep(100)
""")
    assert code == 3 and out == "SIGUSR1\n"


def test_partial_start_is_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rank.py").write_text(PREAMBLE + HANG)
    started: list[processes.Process[bytes]] = []

    def second_fails(command: list[str], variables: dict[str, str], **options: Any) -> processes.Process[bytes]:
        if started:
            raise BlockingIOError("no more processes")
        started.append(processes.Process[bytes](command, env=variables, **options))
        return started[0]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("penstock.engine.launch.start", second_fails)
    with pytest.raises(BlockingIOError):
        launch([sys.executable, "rank.py"], 3)
    assert started[0].returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

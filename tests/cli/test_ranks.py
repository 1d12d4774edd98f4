"""Several ranks from a plain shell: who speaks, who writes, and one clear word where it cannot work."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer
from PIL import Image

from penstock.cli.ranks import Place, check_replicas, take_place
from penstock.config import ParallelConfig
from penstock.errors import ConfigError
from tests import processes

NUM_KILLS = 10
SMALL = ("--size", "56x40", "--steps", "2", "--device", "cpu")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PENSTOCK_LAUNCHER")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder of its own, in a plain shell."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    return place


def penstock(*arguments: str | Path) -> processes.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *map(str, arguments)]
    return processes.run(command, capture_output=True, text=True, check=False, timeout=400)


def test_places() -> None:
    assert Place().speaks and Place().writes and list(Place().items(2)) == [0, 1]
    places = [Place(rank=rank, num_ranks=6, replica=rank // 2, num_replicas=3) for rank in range(6)]
    assert [place.speaks for place in places] == [True, False, False, False, False, False]
    assert [place.writes for place in places] == [True, False, True, False, True, False]
    assert [list(place.items(4)) for place in places[::2]] == [[0, 3], [1], [2]]


def test_rank_finds_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(RANKS, ("5", "8", "5", "8", "127.0.0.1", "29500"), strict=False):
        monkeypatch.setenv(name, value)
    place = take_place(ParallelConfig(data_parallel_size=2, ulysses_degree=4))
    assert place == Place(rank=5, num_ranks=8, replica=1, num_replicas=2)


def test_degrees_that_are_not_the_launchers_ranks_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(RANKS, ("0", "2", "0", "2", "127.0.0.1", "29500"), strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"ulysses\(3\) = 3 is not world_size\(2\)"):
        take_place(ParallelConfig(ulysses_degree=3))
    assert take_place(ParallelConfig(use_hsdp=True)).num_ranks == 2


def test_plain_shell_starts_ranks_and_leaves_with_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def launch(command: list[str], num_ranks: int, equation: str) -> int:
        started.append((command, num_ranks))
        return 7

    monkeypatch.setattr("penstock.engine.launch.launch", launch)
    monkeypatch.setattr(sys, "argv", ["/bin/penstock", "generate", "demo", "--ulysses-degree", "2"])
    assert take_place(ParallelConfig()) == Place() and not started
    with pytest.raises(typer.Exit) as left:
        take_place(ParallelConfig(ulysses_degree=2))
    assert left.value.exit_code == 7
    arguments = ["generate", "demo", "--ulysses-degree", "2"]
    assert started == [([sys.executable, "-P", "-m", "penstock", *arguments], 2)]


def test_ranks_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(command: list[str], num_ranks: int, equation: str) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("penstock.engine.launch.launch", launch)
    with pytest.raises(ConfigError, match="= 2 ranks could not all be started: Resource temporarily"):
        take_place(ParallelConfig(ulysses_degree=2))


def test_more_ranks_than_a_machine_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.engine.processes.most_ranks", lambda: 64)
    with pytest.raises(ConfigError, match=r"ulysses\(65\) = 65 ranks, and this machine starts at most 64: .*Ask"):
        take_place(ParallelConfig(ulysses_degree=65))


def test_values_are_gathered_by_the_watch_which_has_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No exchange, which has one: with replicas that end at very different times it would lose what is done."""

    class Watch:
        def gather(self, value: object, kind: type) -> list[object]:
            return [value, "other"]

    monkeypatch.setattr("penstock.distributed.watch.current_watch", Watch)
    assert Place(num_ranks=2, num_replicas=2).gather("own", str) == ["own", "other"]
    assert Place().gather("own", str) == ["own"]


def test_replicas_without_work_are_refused() -> None:
    check_replicas(ParallelConfig(data_parallel_size=2), 2)
    with pytest.raises(ConfigError, match="--num-images 3 or --data-parallel-size 2"):
        check_replicas(ParallelConfig(data_parallel_size=3), 2)


def test_replicas_share_the_pictures_and_one_tells_of_all(zoo_folder: Callable[[str], Path], elsewhere: Path) -> None:
    flux = zoo_folder("flux")
    done = penstock("generate", flux, "x", *SMALL, "--num-images", "3", "--data-parallel-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    told = json.loads(done.stdout)
    assert told["complete"] is True
    assert [output["path"] for output in told["outputs"]] == ["out-0.png", "out-1.png", "out-2.png"]
    seeds = [output["seed"] for output in told["outputs"]]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["out-0.png", "out-1.png", "out-2.png"]
    alone = penstock("generate", flux, "x", *SMALL, "--seed", str(seeds[1]), "--out", "alone.png")
    assert alone.returncode == 0, alone.stderr
    with Image.open("alone.png") as one, Image.open("out-1.png") as other, Image.open("out-0.png") as control:
        assert one.tobytes() == other.tobytes() != control.tobytes()


def test_ranks_of_one_picture_write_it_once(zoo_folder: Callable[[str], Path], elsewhere: Path) -> None:
    done = penstock("generate", zoo_folder("flux"), "x", *SMALL, "--seed", "3", "--ulysses-degree", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.png  56x40  seed 3  ") and done.stdout.count("\n") == 1
    assert [path.name for path in elsewhere.iterdir()] == ["out.png"]


def test_error_of_all_ranks_is_told_once(elsewhere: Path) -> None:
    done = penstock("generate", "./nowhere", "x", "--ulysses-degree", "2", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_rank_that_fails_alone_ends_the_others_whatever_started_them(zoo_folder: Callable[[str], Path]) -> None:
    """Ranks of a launcher that ends none; rank 1 alone cannot write where it is told to, before weights load."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "penstock", "generate", str(zoo_folder("flux")), "x", *SMALL, "--num-images", "2"]
    with ExitStack() as stack:
        ranks = []
        for rank, out in enumerate(("out.png", "nowhere/out.png")):
            told = zip(RANKS, map(str, (rank, 2, rank, 2, "127.0.0.1", port)), strict=False)
            process = processes.Process[str](
                [*command, "--data-parallel-size", "2", "--out", out],
                env={**os.environ, **dict(told)},
                stderr=processes.PIPE,
                text=True,
            )
            ranks.append(stack.enter_context(process))
        (_, second), (_, first) = (rank.communicate(timeout=400) for rank in reversed(ranks))
        assert ranks[1].returncode == 2 and "nowhere" in second
        assert ranks[0].returncode == 1 and "rank 1 failed" in first and "nowhere" in first


def test_interrupt_ends_all_ranks_and_leaves_no_file(zoo_folder: Callable[[str], Path], elsewhere: Path) -> None:
    asked = (str(zoo_folder("flux")), "x", *SMALL[:2], "--device", "cpu", "--steps", "100000")
    command = [sys.executable, "-m", "penstock", "generate", *asked, "--data-parallel-size", "2", "--num-images", "2"]
    with processes.Process[str](command, stderr=processes.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not all("diffusion_pytorch_model" in maps for maps in ranks_of(process.pid)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "failed" not in err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("moment", ["loading", "denoising"])
def test_killed_rank_of_sharded_weights_ends_all(
    moment: str, zoo_folder: Callable[[str], Path], elsewhere: Path
) -> None:
    asked = (str(zoo_folder("flux")), "x", *SMALL[:2], "--device", "cpu", "--steps", "100000")
    command = [sys.executable, "-m", "penstock", "generate", *asked, "--use-hsdp", "--hsdp-shard-size", "2"]
    with processes.Process[str](command, stderr=processes.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not all("diffusion_pytorch_model" in maps for maps in ranks_of(process.pid)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        if moment == "denoising":
            time.sleep(5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        killed_s = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - killed_s < 10
    assert process.returncode == 128 + signal.SIGKILL and err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not [segment for segment in Path("/dev/shm").iterdir() for child in children if child in segment.name]
    assert list(elsewhere.iterdir()) == []


def ranks_of(launcher: int) -> list[str]:
    """The memory maps of a launcher's two ranks, whichever of its threads has started them."""
    threads = Path(f"/proc/{launcher}/task").glob("*/children")
    try:
        children = [child for thread in threads for child in thread.read_text().split()]
        return [Path(f"/proc/{child}/maps").read_text() for child in children] if len(children) == 2 else [""]
    except OSError:
        return [""]


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_no_rank_outlives_a_command_that_is_killed(command: str, elsewhere: Path) -> None:
    """At any moment, from its first to the denoising of real ranks."""
    asked = ("demo", "x", "--steps", "100000") if command == "generate" else ("demo", "--port", "0")
    words = [sys.executable, "-m", "penstock", command, *asked, "--device", "cpu", "--ulysses-degree", "2"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(elsewhere)}
    moments, options = random.Random(7), {"env": environment, "stderr": processes.DEVNULL, "stdout": processes.DEVNULL}
    begun_s = time.monotonic()
    with processes.Process[bytes](words, **options) as process:
        processes.await_that(lambda: all("diffusion_pytorch_model" in maps for maps in ranks_of(process.pid)), 240)
        whole_s = time.monotonic() - begun_s
    for _ in range(NUM_KILLS):
        with processes.Process[bytes](words, **options) as process:
            time.sleep(moments.uniform(0, 1.2 * whole_s))
            process.kill()
            process.wait()
            processes.await_that(lambda process=process: not process.left())  # type: ignore[misc]

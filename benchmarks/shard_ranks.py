"""Ranks that run one function at once in processes of their own, and what those cost: time, bytes and memory.

    found = run_ranks("forkserver", 4, "module.function", its, arguments)

The function is called with a `Parent` and the arguments; where it calls `parent.stage(name)`, every rank waits for all.
Linux only. Knows neither torch's models nor how weights are sharded.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SAMPLE_S = 0.05
MOST_SAMPLING = 0.2
"""Of a core: where a sample takes long, the next waits."""
GIVE_UP_S = 240.0


class Parent:
    """What a rank says to the process that started it."""

    def __init__(self, end: Connection) -> None:
        self._end = end

    def stage(self, name: str) -> None:
        """Wait until all ranks have come here."""
        self._end.send(name)
        self._end.recv()

    def answer(self, found: dict[str, Any]) -> None:
        """The rank's last words."""
        self._end.send(found)


class Watch:
    """What is done while ranks run; does nothing."""

    def begin(self, pids: list[int]) -> None:
        """The ranks have started."""

    def sample(self) -> None:
        """They run on."""

    def reached(self, stage: str) -> None:
        """All have come to a stage, and wait there."""


class PeakMemory(Watch):
    """The most memory that ranks held together on their way to each stage but the first, in bytes.

    Pages that ranks share count once (Pss), those of mapped files too. Sampled, every 50 ms at the most.

    Attributes:
        starts: by stage, what was held on the way's begin: `all`, `anonymous` (shared memory without a file
            included) and `file`.
        stages: by stage, the peaks of these.
        num_samples: taken.
        sampling_s: seconds that they took.
    """

    def __init__(self) -> None:
        self.starts: dict[str, dict[str, int]] = {}
        self.stages: dict[str, dict[str, int]] = {}
        self.num_samples = 0
        self.sampling_s = 0.0
        self._start: dict[str, int] | None = None
        self._peaks: dict[str, int] = {}
        self._pids: list[int] = []
        self._next_s = 0.0

    def begin(self, pids: list[int]) -> None:
        """Sample these processes."""
        self._pids = pids

    def sample(self) -> None:
        """Look at the memory of all ranks, unless it was done just now."""
        if self._start is not None and time.perf_counter() >= self._next_s:
            self._look()

    def reached(self, stage: str) -> None:
        """Begin the way to the next stage with what is held now."""
        held = self._look()
        if self._start is not None:
            self.starts[stage], self.stages[stage] = self._start, self._peaks
        self._start = self._peaks = held

    def _look(self) -> dict[str, int]:
        begun_s = time.perf_counter()
        held = dict.fromkeys(("all", "anonymous", "file"), 0)
        for pid in self._pids:
            with suppress(OSError):  # it has ended
                found = _numbers(Path(f"/proc/{pid}/smaps_rollup"))
                held["all"] += found["Pss"]
                held["anonymous"] += found["Pss_Anon"] + found["Pss_Shmem"]
                held["file"] += found["Pss_File"]
        self._peaks = {name: max(self._peaks.get(name, 0), size) for name, size in held.items()}
        took_s = time.perf_counter() - begun_s
        self.num_samples += 1
        self.sampling_s += took_s
        self._next_s = begun_s + took_s + max(SAMPLE_S, took_s / MOST_SAMPLING)
        return held


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name: number` of a file; sizes in kB become bytes."""
    found = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return found


def status_bytes(name: str) -> int:
    """A line of this process's /proc/self/status, such as `RssAnon`."""
    return _numbers(Path("/proc/self/status"))[name]


def io_bytes() -> dict[str, int]:
    """What this process has read so far: `rchar` by calls, page cache included, `read_bytes` from the disk."""
    return _numbers(Path("/proc/self/io"))


def machine_s() -> float:
    """CPU seconds that all processes of this machine have had so far, in steps of a hundredth."""
    user, nice, system, _idle, _waiting, *interrupts = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + sum(interrupts[:2])) / os.sysconf("SC_CLK_TCK")


def preload(modules: Iterable[str]) -> None:
    """Have ranks that fork do so from a server that knows these modules; to be called before the first rank."""
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def run_ranks(
    method: str, size: int, function: str, *arguments: Any, watch: Watch | None = None
) -> list[dict[str, Any]] | str:
    """Run a function on so many gloo ranks.

    Args:
        method: `forkserver` (a quick start) or `spawn` (nothing in memory is shared).
        size: number of ranks.
        function: `module.name`.
        *arguments: what pickle takes.
        watch: looks on.

    Returns:
        What each rank answered, in rank order; or which rank ended without an answer, once all are ended.
    """
    context: Any = multiprocessing.get_context(method)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ends, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
            process = context.Process(target=_serve, args=(theirs, environment, function, arguments), daemon=True)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        watch = watch or Watch()
        watch.begin([process.pid for process in processes])
        return _collect(ends, watch)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(ends: list[Connection], watch: Watch) -> list[dict[str, Any]] | str:
    last_s = time.perf_counter()
    found: dict[int, dict[str, Any]] = {}
    arrived: dict[int, str] = {}
    while len(found) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in found and rank not in arrived]
        for end in wait(waiting, timeout=SAMPLE_S):
            rank = ends.index(end)  # type: ignore[arg-type]
            last_s = time.perf_counter()
            try:
                said = ends[rank].recv()
            except EOFError:
                return f"rank {rank} of {len(ends)} ended without an answer; its last words are above"
            (arrived if isinstance(said, str) else found)[rank] = said
        watch.sample()
        if len(arrived) == len(ends):
            watch.reached(arrived[0])
            arrived.clear()
            for end in ends:
                end.send(None)
            last_s = time.perf_counter()
        if time.perf_counter() - last_s > GIVE_UP_S:
            return f"nothing was heard of {len(ends)} ranks for {GIVE_UP_S:.0f} s"
    return [found[rank] for rank in range(len(ends))]


def _serve(end: Connection, environment: dict[str, str], function: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **environment})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, _, name = function.rpartition(".")
    parent = Parent(end)
    parent.answer(getattr(import_module(module), name)(parent, *arguments))
    end.close()
    os._exit(0)  # nothing is torn down

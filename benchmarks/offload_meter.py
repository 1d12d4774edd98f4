"""What a process costs: seconds, bytes and memory; a hard cap on memory; how fast a disk can be read.

Linux only, for all of it is read from /proc and cgroups. Knows neither torch nor models.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 * 2**20
SAMPLE_S = 0.02


@dataclass(frozen=True)
class Cost:
    """What was spent between two moments; CPU seconds are those of all threads."""

    wall_s: float
    cpu_s: float
    read_bytes: int
    written_bytes: int
    major_faults: int


class Meter:
    """`with Meter() as meter:` leaves what the block spent in `meter.cost`."""

    cost: Cost

    def __enter__(self) -> Meter:
        self._begin = _spent()
        return self

    def __exit__(self, *error: object) -> None:
        end, begin = _spent(), self._begin
        self.cost = Cost(
            wall_s=end.wall_s - begin.wall_s,
            cpu_s=end.cpu_s - begin.cpu_s,
            read_bytes=end.read_bytes - begin.read_bytes,
            written_bytes=end.written_bytes - begin.written_bytes,
            major_faults=end.major_faults - begin.major_faults,
        )


def _spent() -> Cost:
    disk = dict(_numbers(Path("/proc/self/io")))
    return Cost(
        wall_s=time.perf_counter(),
        cpu_s=time.process_time(),
        read_bytes=disk["read_bytes"],
        written_bytes=disk["write_bytes"],
        major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    )


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    """The lines `name: number` or `name number` of a file; sizes in kB become bytes."""
    for line in path.read_text().splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            yield words[0], int(words[1]) * (1024 if words[-1] == "kB" else 1)


class PeakMemory:
    """The largest memory of this process since `restart`, resident and anonymous.

    Resident memory is the kernel's own mark (VmHWM), which includes pages of mapped files; where it cannot be
    set back, sampled. Anonymous memory, shared mappings without a file included, is sampled by a thread.
    """

    def __init__(self) -> None:
        self.restart()
        threading.Thread(target=self._watch, daemon=True).start()

    def restart(self) -> None:
        """Forget the peak so far."""
        self._resident = self._anonymous = 0
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._has_mark = True
        except OSError:
            self._has_mark = False
        self._sample()

    def read(self) -> dict[str, int]:
        """The peak since `restart`, in bytes."""
        mark = self._sample()
        return {"rss_bytes": mark if self._has_mark else self._resident, "anonymous_bytes": self._anonymous}

    def _sample(self) -> int:
        status = dict(_numbers(Path("/proc/self/status")))
        self._resident = max(self._resident, status["VmRSS"])
        self._anonymous = max(self._anonymous, status["RssAnon"] + status["RssShmem"])
        return status["VmHWM"]

    def _watch(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            self._sample()


class MemoryGroup:
    """A memory cgroup (v1) of one's own with a hard limit, nested in the group that this process is in.

    The limit counts the page cache that its processes fill as well as their memory: a small machine.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Make the group.

        Raises:
            OSError: where there is no such controller here, or no permission.
        """
        self.folder = _own_memory_group() / f"offload-benchmark-{os.getpid()}"
        self.folder.mkdir()
        try:
            (self.folder / "memory.swappiness").write_text("0")
            (self.folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        except OSError:
            self.remove()
            raise

    def wrap(self, command: list[str]) -> list[str]:
        """The command, run inside the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def read(self) -> dict[str, int]:
        """The most that was charged, how often the limit was hit, and how many processes it killed."""
        return {
            "max_usage_bytes": int((self.folder / "memory.max_usage_in_bytes").read_text()),
            "limit_hits": int((self.folder / "memory.failcnt").read_text()),
            "oom_kills": dict(_numbers(self.folder / "memory.oom_control")).get("oom_kill", 0),
        }

    def remove(self) -> None:
        """Remove the group, whose processes have ended."""
        for _ in range(50):
            try:
                return self.folder.rmdir()
            except OSError:
                time.sleep(0.1)  # the kernel still counts a process that has just ended
        self.folder.rmdir()


def _own_memory_group() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            break
    else:
        raise OSError("no cgroup v1 memory controller")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, flags, *_ = line.split()
        if kind == "cgroup" and "memory" in flags.split(","):
            own = Path(mount) / path.lstrip("/")
            return own if own.is_dir() else Path(mount)
    raise OSError("the cgroup v1 memory controller is not mounted")


def evict(files: Iterable[Path]) -> None:
    """Write files out and drop their pages from the page cache; pages that a process has mapped stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_bandwidth(files: list[Path], num_threads: int = 2) -> dict[str, float]:
    """Read whole files past the page cache (O_DIRECT) in chunks of 8 MiB, and say how fast that went.

    Raises:
        OSError: for a file system without O_DIRECT, such as tmpfs.
    """
    descriptors = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    try:
        with Meter() as meter, ThreadPoolExecutor(num_threads) as pool:
            spans = [(d, start) for d in descriptors for start in range(0, os.fstat(d).st_size, CHUNK_BYTES)]
            work = iter(spans)  # a list's iterator may be shared by threads
            num_bytes = sum(pool.map(_read_chunks, [work] * num_threads))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    cost = meter.cost
    return {
        "num_bytes": num_bytes,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "bytes_per_s": num_bytes / cost.wall_s,
    }


def _read_chunks(work: Iterator[tuple[int, int]]) -> int:
    with mmap.mmap(-1, CHUNK_BYTES) as buffer:
        return sum(os.preadv(descriptor, [buffer], start) for descriptor, start in work)


def read_ahead_bytes(folder: Path) -> int | None:
    """How far the kernel reads ahead on a folder's disk, which flatters or harms mapped files; None where unknown."""
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        return int(Path(f"/sys/class/bdi/{name}/read_ahead_kb").read_text()) * 1024
    except OSError:
        return None

"""The processes of benchmarks/serve.py: the server, the rival's loop, the clients; and what they take of the machine.

Linux only, for memory and seconds are read from /proc.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from penstock.distributed.launcher import bound

HERE = Path(__file__).parent
MOST_START_S = 120.0
MOST_END_S = 30.0
SAMPLE_S = 0.5
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class Talker:
    """A process that answers each line of stdin with a line of JSON."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(HERE / script), *arguments]
        self._process = subprocess.Popen(
            bound(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
        )
        self.pid = self._process.pid
        self._name = script
        self.answer()

    def say(self, line: str) -> None:
        """Ask."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"{self._name} ended with code {self._process.wait()}; run it by hand to see why")

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()


class Loop(Talker):
    """Plain diffusers in a loop."""

    def __init__(self) -> None:
        super().__init__("serve_loop.py")

    def ask(self, count: int, steps: int) -> None:
        """Begin to make pictures."""
        self.say(f"{count} {steps}")

    def make(self, count: int, steps: int) -> dict[str, Any]:
        """Make pictures."""
        self.ask(count, steps)
        return self.answer()


class Clients(Talker):
    """Clients of a server."""

    def __init__(self, port: int) -> None:
        super().__init__("serve_clients.py", str(port))

    def ask(self, deed: str, **options: Any) -> None:
        """Begin one of serve_clients.py's deeds."""
        self.say(json.dumps({"do": deed, **options}))

    def do(self, deed: str, **options: Any) -> dict[str, Any]:
        """Do one, and wait for it."""
        self.ask(deed, **options)
        return self.answer()


class Server:
    """`penstock serve demo`, as a user would start it.

    Attributes:
        port: that it listens on.
        pid: of its first process.
        ready_s: seconds until /ready said so.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        self.port = free_port()
        self._log = folder / "log.txt"
        command = [sys.executable, "-m", "penstock", "serve", "demo", "--device", "cpu", "--port", str(self.port)]
        command += ["--storage", f"file://{folder}/files", "--database", f"sqlite:///{folder}/jobs.sqlite", *options]
        begun_s = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(bound(command), stdout=log, stderr=log, env=ENVIRONMENT)
        self.pid = self._process.pid
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - begun_s > MOST_START_S:
                self.end()
                sys.exit(f"the server is not ready; its last words:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        self.ready_s = time.perf_counter() - begun_s

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        return False

    def end(self) -> None:
        """Ask it to leave, as a service manager would; nothing of it stays."""
        family = tree(self.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(MOST_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print(f"the server took more than {MOST_END_S:.0f} s to leave, and was killed", file=sys.stderr)
        for pid in family[1:]:
            if Path(f"/proc/{pid}").exists():
                print(f"process {pid} of the server was left over", file=sys.stderr)


def first_step_s() -> float:
    """Seconds from nothing to the first step of the plain pipeline."""
    begun_s = time.time()
    command = [sys.executable, str(HERE / "serve_loop.py"), "--once"]
    done = subprocess.run(bound(command), capture_output=True, text=True, env=ENVIRONMENT, check=True)
    at_s: float = json.loads(done.stdout.splitlines()[-1])["at_s"]
    return at_s - begun_s


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def tree(pid: int) -> list[int]:
    """A process, and all that it and its children have started and that still live."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def memory_bytes(pid: int) -> int:
    """Anonymous memory of a process: what it holds for itself; none where it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class MemoryWatch:
    """`with MemoryWatch(server) as memory:` leaves how the server's memory went in `memory.story()`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._samples: list[tuple[float, int, int]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            first, *others = tree(self._server.pid)
            self._samples.append((time.perf_counter(), memory_bytes(first), sum(map(memory_bytes, others))))

    def story(self) -> dict[str, Any]:
        """The server's own memory in the second fifth of the time, when all clients are known, and in the last."""
        own = [sample[1] for sample in self._samples]
        fifth = max(1, len(own) // 5)
        early, late = statistics.median(own[fifth : 2 * fifth] or own), statistics.median(own[-fifth:])
        return {
            "early_bytes": early,
            "late_bytes": late,
            "growth": late / early - 1,
            "ranks_early_bytes": statistics.median([sample[2] for sample in self._samples][fifth : 2 * fifth]),
            "ranks_late_bytes": statistics.median([sample[2] for sample in self._samples][-fifth:]),
            "samples": [list(sample[1:]) for sample in self._samples],
        }


class Machine:
    """How much of the machine others had since a moment."""

    def __init__(self, processes: list[Any]) -> None:
        self._processes = processes
        self._begun_s, self._machine_s, self._own_s = time.perf_counter(), machine_s(), self._ours()

    def _ours(self) -> float:
        return cpu_s(os.getpid()) + sum(tree_cpu_s(process.pid) for process in self._processes)

    def others(self) -> float:
        """Their share; to be asked while all of our processes still live."""
        wall_s = time.perf_counter() - self._begun_s
        busy_s = machine_s() - self._machine_s - (self._ours() - self._own_s)
        return max(0.0, busy_s / wall_s / (os.cpu_count() or 1))


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has had; none where it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def tree_cpu_s(pid: int) -> float:
    """CPU seconds that a process and all that it has started have had."""
    return sum(map(cpu_s, tree(pid)))


def machine_s() -> float:
    """CPU seconds that all processes of this machine have had."""
    user, nice, system, _idle, _waiting, *interrupts = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + sum(interrupts[:2])) / os.sysconf("SC_CLK_TCK")

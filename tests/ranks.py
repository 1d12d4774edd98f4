"""Several gloo ranks on this machine, kept for the whole run: they start once and then take one job after another.

    results = run_ranks(4, a_function_of_a_module, its, arguments)     # one result per rank

The function runs on every rank at once. Ranks fork from a server that has imported the libraries already.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from penstock.distributed.launcher import end_with

_ROOT = str(Path(__file__).resolve().parents[1])
_PRELOADED = [
    "tests.forkserver",
    "torch.distributed",
    "tests.zoo",
    "tests.zoo.denoisers",
    "tests.distributed.sequences",
    "penstock.engine.build",
    "penstock.distributed.hsdp.shards",
]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))  # for the server
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOADED)
_TIMEOUT_S = 120.0
_MOST_RANKS = 9  # kept at a time, in each process of the tests: a rank holds some 150 MB of its own
_POOLS: dict[int, Pool] = {}


class RankError(AssertionError):
    """A rank raised, ended or hung; holds what the ranks said."""


class Pool:
    """Ranks that wait for jobs."""

    def __init__(self, world_size: int) -> None:
        port = _free_port()
        self.ends: list[Connection] = []
        self.processes = []
        self.jobs: list[str] = []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> list[Any]:
        self.jobs.append(f"{function.__module__}.{function.__qualname__}{arguments!r:.60}")
        self._signal(signal.SIGCONT)
        for end in self.ends:
            end.send((function, arguments))
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {end: rank for rank, end in enumerate(self.ends)}
        while waiting:
            ready = wait(list(waiting), timeout=timeout_s if not failures else 3.0)
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not answer; jobs: {'; '.join(self.jobs[-8:])}")
                self._signal(signal.SIGUSR1)  # where they stand, to their standard error
                time.sleep(1)
                break
            for end in ready:
                rank = waiting.pop(end)
                try:
                    has_worked, value = end.recv()
                except EOFError:
                    has_worked, value = False, "ended"
                if has_worked:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
        if failures:
            raise RankError("\n".join(failures))
        self._signal(signal.SIGSTOP)  # the threads of idle ranks take 1 to 4 % of a core each
        return [results[rank] for rank in sorted(results)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.kill()
            process.join()


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = _TIMEOUT_S
) -> list[Any]:
    """Runs `function(*arguments)` on every rank of a gloo world and returns the results in rank order.

    Args:
        world_size: Number of ranks.
        function: At the top of a module.
        *arguments: What pickle takes.
        timeout_s: After which a silent rank counts as hung.

    Raises:
        RankError: With the traceback of each rank that raised. The ranks are replaced by fresh ones.
    """
    os.environ["PENSTOCK_TEST_STARTER"] = str(os.getpid())
    if world_size not in _POOLS:
        while _POOLS and sum(_POOLS) + world_size > _MOST_RANKS:
            _POOLS.pop(next(iter(_POOLS))).close()  # the one that was not used for the longest time
        _POOLS[world_size] = Pool(world_size)
    _POOLS[world_size] = _POOLS.pop(world_size)
    try:
        return _POOLS[world_size].run(function, arguments, timeout_s)
    except BaseException:
        _POOLS.pop(world_size).close()
        raise


@atexit.register
def close_all() -> None:
    """Ends all ranks."""
    while _POOLS:
        _POOLS.popitem()[1].close()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _serve(end: Connection, rank: int, world_size: int, port: int) -> None:
    end_with(
        os.getppid()
    )  # the server of forks, which ends with the tests' process; a rank that is stopped sees no end
    tests = multiprocessing.parent_process()
    if tests is None or not tests.is_alive():  # it ended before this rank was bound
        os._exit(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, function(*arguments))
        except (Exception, pytest.fail.Exception):
            answer = (False, traceback.format_exc())
        end.send(answer)

"""A script as several ranks, each a real process, whose ends are looked at."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.processes import PIPE, Process

PREAMBLE = """
import os, signal, sys, time
from datetime import timedelta
from contextlib import ExitStack
from pathlib import Path

from tests.processes import PIPE, Process
import torch
import torch.distributed as dist
from penstock.distributed.group import Group
from penstock.distributed.watch import Watch, current_watch
from penstock.errors import GenerationError
torch.set_num_threads(1)
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
store = dist.distributed_c10d._get_default_store()
dist.barrier()
if rank == 0:
    Path("met").touch()
def exchange():
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return int(tensor)
def meet(ranks=tuple(range(world_size)), process_group=dist.group.WORLD):
    group = Group("some", ranks.index(rank), ranks, process_group)
    return int(sum(group.all_gather(torch.ones(1))))
def say(*words):
    print(*words, flush=True)
"""
QUICK = "watch = Watch(store, rank, world_size, poll_s=0.1, grace_s=0.5, patience_s=1)\n"


class Ended:
    """How a rank ended: its exit code, what it wrote, and how many seconds after all had met."""

    def __init__(self, process: Process[str], met: Path) -> None:
        self.out, self.err = process.communicate(timeout=240)  # torch alone takes a minute where much runs
        assert met.exists(), self.err
        self.code, self.elapsed_s = process.returncode, time.time() - met.stat().st_mtime


def run(script: str, tmp_path: Path, num_ranks: int = 2) -> list[Ended]:
    (tmp_path / "rank.py").write_text(PREAMBLE + script)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Process[str](
                    [sys.executable, "rank.py"],
                    env={**shared, "RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR"},
                    cwd=tmp_path,
                    stdout=PIPE,
                    stderr=PIPE,
                    text=True,
                )
            )
            for rank in range(num_ranks)
        ]
        return [Ended(rank, tmp_path / "met") for rank in ranks]

"""Ranks of one machine that keep the same bytes: they keep them once, in memory that all of them map.

The memory belongs to no file system: it goes when the last process that maps it does, however that ends. Owns how
neighbours find each other and the memory; does not know what is in it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from penstock.distributed.group import Group
from penstock.weights.host import Common
from penstock.weights.memory import room_for

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = Path("/proc/self/ns/pid")


class Neighbours:
    """The ranks on this machine among those of a group, which all hold the same weights.

    Args:
        group: all of them make one, together.

    Attributes:
        rank: this process among the neighbours.
        size: how many they are.
        least_size: how many there are on the machine that has fewest; the same on all ranks.

    Cost: one small exchange.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        machines = [int(item) for item in group.all_gather(torch.tensor(_machine()))]
        own = [rank for rank, machine in enumerate(machines) if machine == machines[group.rank]]
        self._first = own[0]
        self.rank = own.index(group.rank)
        self.size = len(own)
        self.least_size = min(Counter(machines).values())

    @contextmanager
    def opened(self, num_bytes: int) -> Iterator[Common | None]:
        """Inside, memory that all neighbours map; all ranks of the group enter it, at the same point of the program.

        Args:
            num_bytes: of it; 0 where this rank would keep nothing there, or something of its own.

        Yields:
            None where the ranks do not agree, or some rank could not open it: each has memory of its own then.

        Cost: three small exchanges.
        """
        file = self._open(num_bytes)
        try:
            yield Common(file, self.rank, self.size) if file is not None else None
        finally:
            if file is not None:
                os.close(file)

    def _open(self, num_bytes: int) -> int | None:
        wanted = {int(item) for item in self._group.all_gather(torch.tensor(num_bytes))}
        if wanted != {num_bytes} or not num_bytes:
            return None
        file = _made(room_for(num_bytes)) if self.rank == 0 else None
        told = torch.tensor([os.getpid(), -1 if file is None else file])
        process, number = self._group.all_gather(told)[self._first].tolist()
        if self.rank > 0 and number >= 0:
            file = _opened(Path(f"/proc/{process}/fd/{number}"))
        if all(bool(item) for item in self._group.all_gather(torch.tensor([file is not None]))):
            return file
        if file is not None:
            os.close(file)
        return None


def _machine() -> int:
    """A number for this machine and the processes that can see each other there."""
    try:
        words = _BOOT.read_text() + os.readlink(_PROCESSES)
    except OSError:  # no Linux: nobody else
        words = f"{os.uname().nodename} {os.getpid()}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), signed=True)


def _made(num_bytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    file = os.memfd_create("penstock")
    os.ftruncate(file, num_bytes)
    return file


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR)
    except OSError:  # another user's process, or one that may not be looked into
        return None

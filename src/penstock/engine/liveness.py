"""Whether a rank that says nothing is hung, or only kept from speaking by a busy machine.

A rank beats from a thread of its own. A long call that holds Python's lock, a machine with too much to do or a slow
disk silence it as a deadlock does, but then its process computes, or waits for a processor or the disk. Owns what the
system tells of a process. Does not know ranks, or what follows for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

_WINDOW_S = 1.0
_LEAST_CPU = 0.2  # of one processor: threads that only poll take some hundredths
_LEAST_HELD = 0.5  # of the looks
_HELD = "RD"  # has no processor though it could run; waits for a disk


@dataclass(frozen=True)
class Activity:
    """What a process is doing.

    Attributes:
        cpu_s: processor time that all its threads have used so far.
        is_held: whether one of its threads runs, waits for a processor, or waits for the disk.
        is_stopped: whether a signal has stopped it, or a debugger holds it.
    """

    cpu_s: float
    is_held: bool
    is_stopped: bool


def read_activity(pid: int) -> Activity | None:
    """What a process is doing at this moment; None where the system does not tell (only Linux does), or it has ended.

    Cost: reads one small file per thread.
    """
    folder = Path("/proc") / str(pid)
    try:
        own = _fields(folder)
        states = [_fields(thread)[0] for thread in (folder / "task").iterdir()]
    except (OSError, IndexError):
        return None
    cpu_s = (int(own[11]) + int(own[12])) / os.sysconf("SC_CLK_TCK")
    return Activity(cpu_s, any(state in _HELD for state in states), own[0] in "Tt")


def _fields(folder: Path) -> list[str]:
    """What the kernel tells of a process or thread, from its state on."""
    return (folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()


@dataclass
class SignsOfLife:
    """What a process that says nothing was seen doing, in windows of a second.

    Attributes:
        seen_s: end of the last window in which it was busy.
        is_stopped: whether it was stopped at the last look.
    """

    seen_s: float = float("-inf")
    is_stopped: bool = False
    _looks: list[tuple[float, Activity]] = field(default_factory=list)

    def look(self, now_s: float, activity: Activity | None) -> None:
        """Take note of what it is doing now; without a word from the system of nothing."""
        if activity is None:
            self._looks.clear()
            return
        self.is_stopped = activity.is_stopped
        self._looks.append((now_s, activity))
        (begun_s, first), (_, last) = self._looks[0], self._looks[-1]
        if now_s - begun_s < _WINDOW_S:
            return
        num_held = sum(look.is_held for _, look in self._looks)
        if last.cpu_s - first.cpu_s >= _LEAST_CPU * (now_s - begun_s) or num_held >= _LEAST_HELD * len(self._looks):
            self.seen_s = now_s
        self._looks = self._looks[-1:]

    def forget(self) -> None:
        """It speaks again: the next window begins with the next look."""
        self._looks.clear()
        self.is_stopped = False

"""What a process owes the one that started it: to end with it, and to let it know what the user was told.

    python -I -S launcher.py PID COMMAND...    # becomes the command, and ends when process PID does

Owns the variables that `penstock`'s own launcher sets besides those of torchrun. Imports the standard library alone: it
runs as a script, before anything else of a process. Does not start anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

LAUNCHER = "PENSTOCK_LAUNCHER"
"""Variable with the launcher's process id."""

ERRORS = "PENSTOCK_ERRORS"
"""Variable with the number of an open file: what rank 0 tells the user goes there as well."""

LISTENER = "PENSTOCK_LISTENER"
"""Variable with the number of the socket on which rank 0 listens: a port that was only named could be taken by now."""

SECRET = "PENSTOCK_SECRET"
"""Variable with the secret of a run: ranks sign with it what they tell each other."""

GROUPS = "PENSTOCK_GROUPS"
"""Variable with the number of groups of ranks of an engine, which share this machine."""

DISMISSED = signal.SIGUSR1
"""What the launcher sends the other ranks once one has failed: nobody interrupted them."""

_PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether penstock's own launcher started this process: what interrupts it is then SIGTERM."""
    return LAUNCHER in os.environ


def obey() -> None:
    """End when the launcher ends, even when it is killed; nothing in a process that it did not start."""
    if is_launched():
        end_with(int(os.environ[LAUNCHER]))


def bound(command: Sequence[str]) -> list[str]:
    """A command line that becomes the given one and ends with this process, from its first moment on.

    The kernel ends it with the *thread* that starts it: start it from a thread that lives as long as it shall. A
    process that starts others is not followed by them unless it starts them likewise. Where there is no Linux it only
    looks once whether this process still lives; a command that calls `obey` goes on looking.

    Args:
        command: found on PATH; keeps the process id, the environment, the open files and the signals it is given.

    Cost: about 15 ms of one CPU before the command begins.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_with(parent: int) -> None:
    """End when the process that started this one ends, however it does; at once where it has ended already.

    Args:
        parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before this process listened
        os._exit(1)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def num_groups() -> int:
    """How many groups of ranks, this one among them, an engine runs on this machine; 1 elsewhere."""
    return int(os.environ.get(GROUPS, "1"))


def tell(line: str) -> None:
    """Let the launcher know what rank 0 told the user, so that it does not say it again for another rank."""
    if is_launched() and os.environ.get("RANK") == "0":
        os.write(int(os.environ[ERRORS]), line.encode())


def inherited_listener() -> int | None:
    """The socket that the launcher opened for rank 0, for one use; None where it was used, and in other processes."""
    number = os.environ.pop(LISTENER, None)
    return None if number is None else int(number)


def _become(parent: str, *command: str) -> None:
    """Bind this process to its parent, and run the command in its place."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command finds it; a traceback of this file helps nobody
    end_with(int(parent))
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])

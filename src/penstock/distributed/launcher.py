"""What a rank owes the launcher that started it: to end with it, and to let it know what the user was told.

Owns the variables that `penstock`'s own launcher sets besides those of torchrun. Does not start anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "PENSTOCK_LAUNCHER"
"""Variable with the launcher's process id."""

ERRORS = "PENSTOCK_ERRORS"
"""Variable with the number of an open file: what rank 0 tells the user goes there as well."""

LISTENER = "PENSTOCK_LISTENER"
"""Variable with the number of the socket on which rank 0 listens: a port that was only named could be taken by now."""

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
    if not is_launched():
        return
    launcher = int(os.environ[LAUNCHER])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it ended before this process listened
        os._exit(1)


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
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

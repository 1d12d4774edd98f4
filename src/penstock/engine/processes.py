"""The processes of ranks: how many a machine can have, how one is started and ended, and what it said.

Owns what a command's launcher and an engine's groups have in common. Every process that is started here ends with the
one that started it, from its first moment on (`launcher.bound`). Does not know when ranks are started or ended.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from penstock.distributed.environment import LOOPBACK
from penstock.distributed.launcher import LAUNCHER, SECRET, bound
from penstock.errors import ConfigError

_ALWAYS_RANKS = 64
_RANKS_PER_CPU = 4
_SHOWN_LINES = 40
_SHOWN_BYTES = 2**16


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_ranks() -> int:
    """How many ranks this machine can be asked for: 4 per CPU that this process may use, 64 on small machines."""
    return max(_ALWAYS_RANKS, _RANKS_PER_CPU * num_cpus())


def require_startable(num_ranks: int, equation: str = "") -> None:
    """Refuse more ranks than this machine can reasonably have.

    Args:
        num_ranks: how many are to be started here.
        equation: what makes that number, in words.

    Raises:
        ConfigError: for more than `most_ranks()`.
    """
    if num_ranks > most_ranks():
        raise ConfigError(
            f"{f'{equation} = ' if equation else ''}{num_ranks} ranks, and this machine starts at most {most_ranks()}: "
            f"{_RANKS_PER_CPU} per CPU, or {_ALWAYS_RANKS}. Ask for smaller degrees, or start the ranks on several "
            "machines (torchrun, srun, mpirun)."
        )


def rank_variables(num_ranks: int, num_sharing: int, port: int) -> dict[str, str]:
    """The variables that ranks which work together share: what torchrun sets, and a fair part of the CPU for each.

    Args:
        num_ranks: that work together.
        num_sharing: ranks that share this machine's CPUs.
        port: on which rank 0 listens, on the loopback address.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, num_cpus() // num_sharing)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a peer that has gone is told of in words, not in stacks of addresses
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
        SECRET: secrets.token_hex(32),
    }


@dataclass
class RankProcess:
    """The process of a rank.

    Attributes:
        number: of the rank, from 0.
        process: that runs it.
        said: file with what it prints; None where it has the user's terminal.
        has_session: whether it has a session of its own, which ends with it.
    """

    number: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None
    has_session: bool = False

    def tail(self, begin: int = 0) -> str:
        """The last lines that it printed, none from before a position in the file."""
        if self.said is None:
            return ""
        self.said.seek(max(begin, self.said.seek(0, os.SEEK_END) - _SHOWN_BYTES))
        lines = self.said.read().replace(b"\0", b"").decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-_SHOWN_LINES:])

    def kill(self) -> None:
        """End it at once, with all that it has started in its session; it is gone some moments later."""
        if self.process.poll() is not None:
            return
        if self.has_session:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()

    @property
    def how_it_ended(self) -> str:
        """Its exit code, or the signal that ended it, in words."""
        code = self.process.returncode
        return f"exit {code}" if code >= 0 else f"signal {-code}, {_name_of(-code)}"


def start(
    command: Sequence[str], variables: Mapping[str, str], *, has_session: bool = False, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process, and with the thread that calls this.

    Args:
        command: what to run.
        variables: its environment.
        has_session: whether it gets a session of its own: the terminal's signals do not reach it.
        **options: `Popen`'s, for its files.

    Raises:
        OSError: where the system has no room for it.
    """
    return subprocess.Popen(bound(command), env=dict(variables), start_new_session=has_session, **options)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one without a name, of those for real time
        return "unknown"

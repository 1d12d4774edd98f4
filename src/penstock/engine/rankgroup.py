"""A group of ranks that make pictures together: their processes, what they last said, how they are ended.

Owns starting, watching and ending them; a group whose ranks died is started again, later after each failure. Does not
know orders beyond their names, or the socket that ranks speak through.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from subprocess import PIPE, TimeoutExpired
from typing import IO, Literal

import msgspec

from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed.environment import LOOPBACK
from penstock.distributed.launcher import GROUPS, LISTENER
from penstock.engine.liveness import SignsOfLife, read_activity
from penstock.engine.processes import RankProcess, rank_variables, start

State = Literal["starting", "idle", "busy", "restarting", "failed"]

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_LOADING_S = 120.0  # without a word: its libraries may come from a slow disk
_LOOKS_AFTER_S = 1.0  # a rank beats twice a second
_KEPT_BYTES = 2**23
_SECRETS = ("PENSTOCK_API_KEYS", "AWS_", "PGPASS", "PGSERVICE", "PGSSL")
"""What names of variables begin with that ranks have no use for."""
_WORKER = (sys.executable, "-P", "-m", "penstock.engine.worker")


class WorkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told when it is started, as JSON on its standard input.

    Attributes:
        address: of the engine's socket.
        name: by which the engine knows this very process.
        model: what to load.
        load: how.
        parallel: how the work of a group is split; no replicas.
    """

    address: str
    name: str
    model: str
    load: LoadConfig
    parallel: ParallelConfig


@dataclass(kw_only=True)
class Rank(RankProcess):
    """One process of a group.

    Attributes:
        name: on the wire; another one after each start.
        said: what it prints.
        heard_s: when it last said anything, on the group's clock.
        signs: what it was seen doing since, where it says nothing.
        is_ready: whether it has loaded the model.
        is_working: whether it has been given work and has not ended it.
        device_bytes: that its weights and activations hold on the device.
        host_bytes: that its process holds.
        past_bytes: of what it has printed, those of work that it has ended: they say nothing of its own end.
    """

    name: str
    said: IO[bytes]
    heard_s: float
    signs: SignsOfLife = field(default_factory=SignsOfLife)
    is_ready: bool = False
    is_working: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    past_bytes: int = 0

    def last_words(self) -> str:
        """The last line that it printed since it last ended some work; empty where it was killed, or said nothing."""
        is_killed = self.process.returncode == -signal.SIGKILL
        return "" if is_killed else "".join(self.tail(self.past_bytes).splitlines()[-1:])

    def rest(self) -> None:
        """It has ended its work."""
        self.is_working = False
        self.past_bytes = os.fstat(self.said.fileno()).st_size

    def forget(self) -> None:
        """Give back the room of what it printed long ago; what follows goes behind a hole in the file."""
        if os.fstat(self.said.fileno()).st_blocks * 512 > _KEPT_BYTES:
            self.said.truncate(0)


@dataclass
class RankGroup:
    """Ranks that make one picture together.

    Args:
        number: among the groups of an engine.
        num_groups: of the engine; they share this machine.
        work: what ranks are told; `name` is set for each.
        clock: tells seconds.

    Attributes:
        state: starting; idle or busy once all ranks are ready; restarting while it waits to be started again; failed
            for good.
        ranks: those that were started.
        num_restarts: how often it was started again.
        message: why it does not run, or last failed.
        due_s: when it is to be started again.
        begun_s: when it was started last.
        moved_s: when its work last went on.
    """

    number: int
    num_groups: int
    work: WorkConfig
    clock: Callable[[], float] = time.monotonic
    state: State = "restarting"
    ranks: list[Rank] = field(default_factory=list)
    num_restarts: int = -1
    message: str = ""
    due_s: float = 0.0
    begun_s: float = 0.0
    moved_s: float = 0.0
    _num_failures: int = 0
    _leaving: list[Rank] = field(default_factory=list)

    def start(self) -> None:
        """Start all ranks; must be called from a thread that lives as long as they shall: they end with it.

        Those that were killed before must be gone (`is_gone`): they may still hold the memory of the device.

        Raises:
            OSError: where not all could be started; none is left.
        """
        self.num_restarts += 1
        self.begun_s = self.clock()
        self.state, self.message = "starting", ""
        with socket.create_server((LOOPBACK, 0)) as listener:
            shared = self._variables(listener.getsockname()[1])
            try:
                for number in range(self.work.parallel.world_size):
                    self.ranks.append(self._start(number, shared, listener.fileno()))
            except OSError:
                self.kill()
                raise

    def _start(self, number: int, shared: dict[str, str], listener: int) -> Rank:
        said = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when its rank is gone
        name = f"{self.number}.{self.num_restarts}.{number}"
        is_first = number == 0
        own = {"RANK": str(number), "LOCAL_RANK": str(number), **({LISTENER: str(listener)} if is_first else {})}
        with ExitStack() as unless_started:
            unless_started.callback(said.close)
            process = start(
                _WORKER,
                {**shared, **own},
                has_session=True,  # the terminal's Ctrl-C is for who started the engine
                stdin=PIPE,
                stdout=said,
                stderr=said,
                pass_fds=(listener,) if is_first else (),
            )
            unless_started.pop_all()
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin as told:  # it is dead already, which is noticed
                told.write(msgspec.json.encode(msgspec.structs.replace(self.work, name=name)))
        return Rank(number=number, name=name, process=process, said=said, has_session=True, heard_s=self.clock())

    def _variables(self, port: int) -> dict[str, str]:
        """The environment that the ranks share: what torchrun sets, their own GPUs, and a fair part of the CPU."""
        num_ranks = self.work.parallel.world_size
        shared = rank_variables(num_ranks, num_ranks * self.num_groups, port)
        variables = {
            **dict.fromkeys(("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"), "critical"),
            **{name: value for name, value in shared.items() if not name.startswith(_SECRETS)},
            GROUPS: str(self.num_groups),
        }
        if self.num_groups > 1:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = (
                seen.split(",") if seen is not None else [str(index) for index in range(self.num_groups * num_ranks)]
            )
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(
                devices[self.number * num_ranks : (self.number + 1) * num_ranks]
            )
        return variables

    def first_dead(self) -> Rank | None:
        """A rank whose process has ended by itself."""
        return next((rank for rank in self.ranks if rank.process.poll() is not None), None)

    def first_silent(self, most_s: float, longest_s: float) -> Rank | None:
        """A rank that is hung: it says nothing, and nothing shows that it would if it could.

        Signs of life are a step of the group, which all its ranks take together, and what the system tells of its
        process (`liveness`).

        Args:
            most_s: seconds that a rank may show no sign of life; while it loads two minutes, if that is more.
            longest_s: seconds that it may say nothing, whatever else it does.
        """
        now_s = self.clock()
        for rank in self.ranks:
            limit_s = most_s if rank.is_ready else max(most_s, _LOADING_S)
            if now_s - rank.heard_s > _LOOKS_AFTER_S:
                rank.signs.look(now_s, read_activity(rank.process.pid))
            else:
                rank.signs.forget()
            alive_s = max(rank.heard_s, rank.signs.seen_s, self.moved_s)
            if now_s - alive_s > limit_s or now_s - rank.heard_s > max(limit_s, longest_s):
                return rank
        return None

    def silence_of(self, rank: Rank) -> str:
        """In words: how long a rank has said nothing, and what it does instead."""
        now_s = self.clock()
        if rank.signs.is_stopped:
            what = "a signal or a debugger has stopped it"
        elif rank.signs.seen_s > now_s - 2 * _LOOKS_AFTER_S:
            what = "although it computes"
        else:
            what = "and does nothing"
        return f"rank {rank.number} has been silent for {now_s - rank.heard_s:.0f} s, {what}"

    def excuse(self, paused_s: float) -> None:
        """Count no time in which this process itself stood still: the whole machine may have."""
        self.begun_s += paused_s
        self.moved_s += paused_s
        for rank in self.ranks:
            rank.heard_s += paused_s
            rank.signs.forget()

    def fall(self, message: str) -> None:
        """End what is left after a failure, and say when it is to be started again."""
        self.kill()
        self.message = message
        self.state = "restarting"
        self.due_s = self.clock() + min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(self._num_failures, 10))
        self._num_failures += 1

    def fail(self, message: str) -> None:
        """End for good."""
        self.kill()
        self.message = message
        self.state = "failed"

    def succeed(self) -> None:
        """Forget earlier failures: it works."""
        self._num_failures = 0

    def kill(self) -> None:
        """End all processes; they are gone some moments later, when the system has taken back what they held."""
        for rank in self.ranks:
            rank.kill()
        self._leaving += self.ranks
        self.ranks.clear()

    def is_gone(self) -> bool:
        """Whether nothing is left of the processes that were killed."""
        for rank in [rank for rank in self._leaving if rank.process.poll() is not None]:
            rank.said.close()
            self._leaving.remove(rank)
        return not self._leaving

    def wait(self, deadline_s: float) -> None:
        """Wait until all processes have ended, or that time on the monotonic clock has come."""
        for rank in (*self.ranks, *self._leaving):
            with suppress(TimeoutExpired):
                rank.process.wait(max(0.0, deadline_s - time.monotonic()))


def how_it_ended(rank: Rank) -> str:
    """In words: the exit code or the signal of a process, and its last words."""
    last = rank.last_words()
    return f"rank {rank.number} died ({rank.how_it_ended}){': ' if last else ''}{last}"

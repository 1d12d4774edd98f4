"""The ranks of a command: started from a plain shell, found where a launcher started them.

Owns which rank speaks and writes, and which pictures it makes. Does not know how the work on one is split.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import typer

from penstock.config import OffloadConfig, ParallelConfig
from penstock.distributed.environment import read_environment, start, stop
from penstock.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among the ranks of a command.

    Attributes:
        rank: from 0.
        num_ranks: in all.
        replica: which group of ranks it is in, of those that each make pictures of their own.
        num_replicas: how many there are.
    """

    rank: int = 0
    num_ranks: int = 1
    replica: int = 0
    num_replicas: int = 1

    @property
    def speaks(self) -> bool:
        """Whether it has the user's terminal: the first of all."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether it saves the pictures of its replica: the first of it."""
        return self.rank % (self.num_ranks // self.num_replicas) == 0

    def items(self, count: int) -> range:
        """Which of so many pictures its replica makes."""
        return range(self.replica, count, self.num_replicas)

    def gather(self, value: T, kind: type[T]) -> list[T]:
        """Each rank's value, in their order, however long the slowest takes; all ranks must call this, while joined.

        Args:
            value: numbers, texts, lists, mappings.
            kind: its type.

        Raises:
            GenerationError: where another rank failed instead, or is gone.
        """
        from penstock.distributed.watch import current_watch

        watch = current_watch() if self.num_ranks > 1 else None
        return [value] if watch is None else watch.gather(value, kind)

    @contextmanager
    def joined(self, config: OffloadConfig) -> Iterator[None]:
        """Inside, this rank has joined the others, and none waits for one that has failed; nothing on one rank.

        They part once all is done; after a failure there is nothing to part from in order.

        Args:
            config: names the device.

        Raises:
            ConfigError: for a device that this machine has not, and where the others do not come.
            GenerationError: on leaving, where another rank's failure made this one fail.
        """
        environment = read_environment() if self.num_ranks > 1 else None
        if environment is None:
            yield
            return
        from penstock.distributed.watch import current_watch
        from penstock.engine.placement import choose_device

        start(environment, choose_device(config))
        with current_watch() or nullcontext():
            yield
        stop()


def take_place(parallel: ParallelConfig) -> Place:
    """Find this process's place; a plain shell that asks for several ranks starts them, and leaves as they do.

    Raises:
        ConfigError: where a launcher's variables are incomplete, or the degrees do not make its number of ranks; where
            not all ranks could be started; for more ranks than this machine can reasonably have, before any is started.
        typer.Exit: with the exit code of the ranks that were started.
    """
    environment = read_environment()
    if environment is not None:
        atexit.register(gc.freeze)  # else Python looks at all of torch's objects once more: 1 s, and more under load
        from penstock.distributed.mesh import require_ranks

        asked = parallel.for_ranks(environment.world_size)
        require_ranks(asked, environment.world_size)  # before any rank waits for another
        num_replicas = parallel.data_parallel_size
        size = max(1, environment.world_size // num_replicas)
        return Place(
            rank=environment.rank,
            num_ranks=environment.world_size,
            replica=environment.rank // size,
            num_replicas=num_replicas,
        )
    if parallel.world_size == 1:
        return Place()
    from penstock.engine.launch import launch

    try:
        code = launch(_command(), parallel.world_size, equation=parallel.equation())
    except OSError as error:
        raise ConfigError(
            f"{parallel.equation()} = {parallel.world_size} ranks could not all be started: {error.strerror or error}. "
            "Ask for fewer."
        ) from error
    raise typer.Exit(code)


def _command() -> list[str]:
    """This very command line, for a rank; a folder called `penstock` in the current one is not looked into."""
    is_module = sys.argv[0].endswith("__main__.py")
    return [sys.executable, *([] if is_module else ["-P"]), "-m", "penstock", *sys.argv[1:]]


def check_replicas(parallel: ParallelConfig, num_images: int) -> None:
    """Refuse replicas that would have nothing to do.

    Raises:
        ConfigError: where there are more of them than pictures.
    """
    if parallel.data_parallel_size > num_images:
        raise ConfigError(
            f"data_parallel_size({parallel.data_parallel_size}) replicas each make pictures of their own, and "
            f"{num_images} is asked for. Try --num-images {parallel.data_parallel_size} or --data-parallel-size "
            f"{num_images}."
        )

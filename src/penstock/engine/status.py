"""What an engine may be asked for, and what it says of itself.

Owns the limits and the nouns of a status. Does not know how ranks are run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from penstock.engine.rankgroup import State
from penstock.errors import ConfigError
from penstock.request import is_whole


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_queue: orders that may wait.
        max_batch_size: orders that may run as one batch; 1 is off.
        start_timeout_s: seconds until a group of ranks must be ready.
        step_timeout_s: seconds without any sign of progress after which ranks that work count as hung.
        rank_timeout_s: seconds after which a rank that says nothing and shows no other sign of life counts as hung; one
            that only says nothing, because it computes or the machine is busy, has `step_timeout_s`.

    Raises:
        ConfigError: for a value out of range.
    """

    max_queue: int = 64
    max_batch_size: int = 1
    start_timeout_s: float = 1800.0
    step_timeout_s: float = 1800.0
    rank_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_batch_size"):
            if not is_whole(getattr(self, name), 1):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a whole number from 1 up.")
        for name in ("start_timeout_s", "step_timeout_s", "rank_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is no time. Give seconds above 0.")


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """A rank as the engine sees it; `beat_age_s`: seconds since it last said anything."""

    rank: int
    pid: int
    state: Literal["starting", "alive", "dead"]
    beat_age_s: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupStatus:
    """A group of ranks; `message`: why it does not run, or what it loads."""

    number: int
    state: State
    ranks: list[RankStatus] = field(default_factory=list)
    num_restarts: int = 0
    order_ids: list[str] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """An engine: its groups, how many orders wait, and denoising steps per second over the last ten seconds."""

    groups: list[GroupStatus]
    queue_depth: int
    steps_per_s: float

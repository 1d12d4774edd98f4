"""An engine's thread whose ranks are played: no processes, no waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pytest

from penstock.config import LoadConfig, ParallelConfig
from penstock.engine import fleet as fleet_module
from penstock.engine.fleet import Fleet
from penstock.engine.rankgroup import Rank, RankGroup
from penstock.engine.status import EngineConfig
from penstock.request import GenerationRequest
from penstock.wire import Ended, Order, OrderEvent, Ready


class Post:
    """Hands over what a test has ranks say, and keeps what they are told."""

    def __init__(self) -> None:
        self.coming: list[tuple[str, Any]] = []
        self.told: list[tuple[str, Any]] = []

    def open(self) -> str:
        return "ipc:///nowhere"

    def hear(self, timeout_ms: int) -> list[tuple[str, Any]]:
        coming, self.coming = self.coming, []
        return coming

    def send(self, name: str, message: Any) -> None:
        self.told.append((name, message))

    def wake(self) -> None:
        """Nobody sleeps."""

    def close(self) -> None:
        """Nothing is open."""


SAID = b"Traceback\nlast words"


@dataclass
class Process:
    """A process that ends when a test says so."""

    pid: int = 1
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9

    def wait(self, timeout: float | None = None) -> int | None:
        return self.returncode


@dataclass
class Stage:
    """An engine's thread on a stage."""

    fleet: Fleet
    post: Post
    heard: list[OrderEvent] = field(default_factory=list)

    def say(self, *messages: tuple[str, Any]) -> None:
        self.post.coming += messages
        self.fleet.step()

    def begin(self, order_id: str = "a") -> None:
        self.fleet.submit(Order(id=order_id, request=GenerationRequest(prompt="x"), folder=""), self.heard.append)
        self.fleet.step()

    @property
    def groups(self) -> list[RankGroup]:
        return self.fleet._groups

    def ends(self) -> list[str | None]:
        return [event.failure.code if event.failure else None for event in self.heard if isinstance(event, Ended)]


def ready(device: str = "cpu") -> Ready:
    return Ready(pipeline={"kind": "image", "effective": {"device": device}})


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(fleet_module, "Post", Post)
    monkeypatch.setattr("penstock.engine.rankgroup.read_activity", lambda pid: None)  # there is no process

    def start(group: RankGroup, number: int, shared: Any, listener: int) -> Rank:
        name = f"{group.number}.{group.num_restarts}.{number}"
        return Rank(number=number, name=name, process=Process(), said=BytesIO(SAID), heard_s=group.clock())  # type: ignore[arg-type]

    monkeypatch.setattr(RankGroup, "_start", start)
    monkeypatch.setattr(Rank, "forget", lambda rank: None)  # what it printed is no file
    monkeypatch.setattr(Rank, "rest", lambda rank: setattr(rank, "is_working", False))

    def made(
        is_ready: bool = True,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        **degrees: int,
    ) -> Stage:
        fleet = Fleet("demo", ParallelConfig(**degrees), LoadConfig(), config or EngineConfig(), clock)
        fleet.step()
        stage = Stage(fleet, fleet._post)  # type: ignore[arg-type]
        if is_ready:
            stage.say(*((rank.name, ready()) for group in stage.groups for rank in group.ranks))
        return stage

    yield made


def states(stage: Stage) -> list[str]:
    return [group.state for group in stage.fleet.status().groups]

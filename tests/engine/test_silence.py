"""Ranks that say nothing: hung, kept from speaking, or paused with the machine. Clocks and processes are played."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from penstock.engine import fleet as fleet_module
from penstock.engine.liveness import Activity
from penstock.engine.status import EngineConfig
from penstock.request import StepEvent
from penstock.wire import Beat, Ended, Step
from tests.engine.played import Stage, states


@dataclass
class Machine:
    """A clock that a test moves, and what the system tells of every rank's process."""

    stage: Stage = None  # type: ignore[assignment]
    now_s: float = 1000.0
    cpu: float = 0.0
    is_held: bool = False
    is_stopped: bool = False

    def read(self, pid: int) -> Activity:
        return Activity(self.cpu * self.now_s, self.is_held, self.is_stopped)

    def run(self, seconds: float, *speakers: str, step: bool = False) -> None:
        """The engine's thread steps twice a second while some ranks speak."""
        said: list[tuple[str, Any]] = [(name, Beat()) for name in speakers]
        for number in range(int(2 * seconds)):
            self.now_s += 0.5
            made = Step(id="a", event=StepEvent(item=0, stage=0, step=number, total=9999, elapsed_s=0))
            self.stage.say(*said, *([(speakers[0], made)] if step else []))


@pytest.fixture
def machine(play: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with two ranks at work; a rank counts as hung after 30 s, and a step may take 200 s."""
    machine = Machine()
    monkeypatch.setattr("penstock.engine.rankgroup.read_activity", machine.read)
    config = EngineConfig(step_timeout_s=200, rank_timeout_s=30)
    machine.stage = play(config=config, clock=lambda: machine.now_s, ulysses_degree=2)
    machine.stage.begin()
    machine.run(5, "0.0.0", "0.0.1")
    return machine


def why(machine: Machine) -> str:
    """Why the order ended; empty where it goes on."""
    ended = [event.failure.message for event in machine.stage.heard if isinstance(event, Ended) and event.failure]
    return "".join(ended)


def test_a_rank_that_does_nothing_is_hung_after_its_time(machine: Machine) -> None:
    machine.run(29, "0.0.0")
    assert not why(machine)
    machine.run(3, "0.0.0")
    assert why(machine).startswith("rank 1 has been silent for 30 s, and does nothing, and was ended. ")
    assert "--rank-timeout-s" in why(machine) and machine.stage.ends() == ["rank_hung"]


def test_a_rank_that_is_stopped_is_told_from_one_that_hangs(machine: Machine) -> None:
    machine.is_stopped = True
    machine.run(32, "0.0.0")
    assert "a signal or a debugger has stopped it" in why(machine)


@pytest.mark.parametrize(("cpu", "is_held"), [(1.0, False), (0.0, True)])
def test_a_rank_that_computes_or_is_kept_from_it_is_not_hung(machine: Machine, cpu: float, is_held: bool) -> None:
    """A long call that holds Python's lock; a machine that is too busy. It has the time that a step has."""
    machine.cpu, machine.is_held = cpu, is_held
    machine.run(190, "0.0.0")
    assert not why(machine)
    machine.run(15, "0.0.0")
    assert "silent for 200 s, although it computes" in why(machine) or "no step for 200 s" in why(machine)


def test_threads_that_poll_are_no_sign_of_life(machine: Machine) -> None:
    machine.cpu = 0.04
    machine.run(32, "0.0.0")
    assert machine.stage.ends() == ["rank_hung"]


def test_a_step_of_its_group_is_a_sign_of_life(machine: Machine) -> None:
    """Ranks of a group take their steps together."""
    machine.run(120, "0.0.0", step=True)
    assert not why(machine)
    machine.run(32, "0.0.0")
    assert "rank 1 has been silent for 150 s" in why(machine)


@pytest.mark.parametrize("is_counted", [False, True])
def test_a_pause_of_the_machine_ends_nothing(
    machine: Machine, is_counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and ranks stand still for an hour, as when a virtual machine is moved. The control counts that time."""
    if is_counted:
        monkeypatch.setattr(fleet_module, "_PAUSE_S", float("inf"))
    machine.run(20, "0.0.0")
    machine.now_s += 3600
    machine.stage.fleet.step()
    machine.run(5, "0.0.0")
    machine.run(100, "0.0.0", "0.0.1")
    assert bool(why(machine)) == is_counted
    machine.run(32)
    assert "silent" in why(machine)  # and afterwards silence counts again


def test_a_pause_while_ranks_start_is_not_counted(play: Any) -> None:
    machine = Machine()
    config = EngineConfig(start_timeout_s=300)
    machine.stage = play(is_ready=False, config=config, clock=lambda: machine.now_s)
    machine.run(10, "0.0.0")
    machine.now_s += 3600
    machine.run(200, "0.0.0")
    assert states(machine.stage) == ["starting"]
    machine.run(95, "0.0.0")
    assert states(machine.stage) == ["failed"]

"""What the engine's thread decides, with ranks that are played: no processes, no waiting."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.engine.rankgroup import RankGroup
from penstock.engine.status import EngineConfig
from penstock.errors import ConfigError, EngineError, NotReadyError, PenstockError, WeightsError
from penstock.request import GenerationRequest, StepEvent
from penstock.wire import (
    Cancel,
    Check,
    Checked,
    Ended,
    Idle,
    Made,
    MadeFile,
    Refused,
    Run,
    Step,
)
from tests.engine.played import ready, states


def test_a_group_works_once_all_of_its_ranks_are_ready(play: Any) -> None:
    stage = play(is_ready=False, ulysses_degree=2)
    with pytest.raises(NotReadyError, match="not ready|no group"):
        stage.begin()
    stage.say(("0.0.0", ready()))
    assert states(stage) == ["starting"] and stage.fleet.description is None
    stage.say(("0.0.1", ready()))
    assert states(stage) == ["idle"]
    stage.fleet.wait_ready(0)
    stage.begin()
    assert [(name, type(message)) for name, message in stage.post.told] == [("0.0.0", Run), ("0.0.1", Run)]
    stage.say(("0.0.0", Ended(id="a")), ("0.0.0", Idle()))
    assert stage.ends() == [] and states(stage) == ["busy"]
    stage.say(("0.0.1", Idle()))
    assert stage.ends() == [None] and states(stage) == ["idle"]


def test_the_first_free_group_takes_the_next(play: Any) -> None:
    stage = play(data_parallel_size=2)
    for order_id in "abc":
        stage.begin(order_id)
    assert [name for name, _ in stage.post.told] == ["0.0.0", "1.0.0"] and stage.fleet.status().queue_depth == 1
    assert stage.fleet.position("c") is not None
    stage.say(("1.0.0", Ended(id="b")), ("1.0.0", Idle()))
    assert stage.post.told[-1][0] == "1.0.0" and stage.post.told[-1][1].orders[0].id == "c"


def test_a_dead_rank_ends_its_group_and_no_other(play: Any) -> None:
    stage = play(data_parallel_size=2, ulysses_degree=2)
    stage.begin("a")
    stage.begin("b")
    stage.groups[0].ranks[1].process.returncode = -11
    stage.fleet.step()
    assert stage.ends() == ["rank_died"] and states(stage) == ["restarting", "busy"]
    failure = stage.heard[-1].failure  # type: ignore[union-attr]
    assert failure.message == "rank 1 died (signal 11, SIGSEGV): last words. Ask again."
    stage.say(("0.0.0", Ended(id="a")))  # from the grave
    assert stage.ends() == ["rank_died"]
    stage.groups[0].due_s = 0
    stage.fleet.step()
    assert states(stage) == ["starting", "busy"]
    stage.say(("0.0.0", ready()), ("0.0.1", ready()))  # names of before
    assert states(stage)[0] == "starting"
    stage.say(("0.1.0", ready()), ("0.1.1", ready()))
    assert states(stage) == ["idle", "busy"] and stage.fleet.status().groups[0].num_restarts == 1


def test_silence_and_standing_still_count_as_hung(play: Any) -> None:
    stage = play(config=EngineConfig(step_timeout_s=50))
    stage.begin()
    stage.groups[0].ranks[0].heard_s -= 60
    stage.groups[0].moved_s -= 40
    stage.fleet.step()
    assert stage.ends() == ["rank_hung"]
    stage = play(config=EngineConfig(step_timeout_s=50))
    stage.begin()
    stage.groups[0].moved_s -= 60
    stage.say(("0.0.0", Step(id="a", event=StepEvent(item=0, stage=0, step=1, total=2, elapsed_s=0))))
    assert stage.ends() == []
    stage.groups[0].moved_s -= 60
    stage.fleet.step()
    assert stage.ends() == ["rank_hung"] and "no step for 50 s" in stage.heard[-1].failure.message  # type: ignore


def test_late_starts_are_given_up(play: Any) -> None:
    stage = play(is_ready=False, config=EngineConfig(start_timeout_s=10))
    stage.groups[0].begun_s -= 11
    stage.fleet.step()
    with pytest.raises(EngineError, match="not ready after 10 s"):
        stage.fleet.wait_ready(0)
    assert states(stage) == ["failed"]


@pytest.mark.parametrize(
    ("kind", "error"), [("ConfigError", ConfigError), ("WeightsError", WeightsError), ("Odd", EngineError)]
)
def test_what_ranks_refuse_at_first_is_the_engines_own_error(play: Any, kind: str, error: type[PenstockError]) -> None:
    stage = play(is_ready=False)
    stage.say(("0.0.0", Refused(kind=kind, message="too little of it")))
    with pytest.raises(error, match="too little of it"):
        stage.fleet.wait_ready(0)


def test_later_refusals_are_tried_again_where_that_may_help(play: Any) -> None:
    stage = play()
    for kind, state in (("WeightsError", "restarting"), ("ConfigError", "failed")):
        stage.groups[0].ranks[0].process.returncode = 1
        stage.fleet.step()
        stage.groups[0].due_s = 0
        stage.fleet.step()
        stage.say((stage.groups[0].ranks[0].name, Refused(kind=kind, message="no")))
        assert states(stage) == [state]
        stage.groups[0].due_s = 0
        stage.fleet.step()
        if state == "restarting":
            stage.say((stage.groups[0].ranks[0].name, ready()))
    with pytest.raises(NotReadyError, match="failed for good: no"):
        stage.begin("b")


def test_groups_on_other_devices_are_no_replicas(play: Any) -> None:
    stage = play(is_ready=False, data_parallel_size=2)
    stage.say(("0.0.0", ready("cuda:0")))
    stage.say(("1.0.0", ready("cpu")))
    assert states(stage) == ["idle", "failed"]
    assert "its ranks run on cpu, those of other groups on cuda" in stage.fleet.status().groups[1].message


def test_a_replica_that_dies_before_any_works_returns_once_one_does(play: Any) -> None:
    stage = play(is_ready=False, data_parallel_size=2)
    stage.groups[0].ranks[0].process.returncode = -9
    stage.fleet.step()
    assert states(stage) == ["failed", "starting"]
    stage.say(("1.0.0", ready()))
    assert states(stage) == ["restarting", "idle"] and "died" in stage.fleet.status().groups[0].message
    stage.fleet.wait_ready(0)
    stage.begin()
    stage.groups[0].due_s = 0
    stage.fleet.step()
    stage.say(("0.1.0", ready()))
    assert states(stage) == ["idle", "busy"]


def test_ranks_that_no_system_starts_are_an_error_at_first(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(RankGroup, "_start", fail)
    stage = play(is_ready=False)
    with pytest.raises(EngineError, match="could not be started: Resource temporarily unavailable"):
        stage.fleet.wait_ready(0)
    assert states(stage) == ["failed"]


def test_a_group_starts_again_once_its_processes_are_gone(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = play()
    process = stage.groups[0].ranks[0].process
    monkeypatch.setattr(process, "kill", lambda: None)  # what it held is still being taken back
    stage.groups[0].ranks[0].heard_s -= 60
    stage.fleet.step()
    stage.groups[0].due_s = 0
    stage.fleet.step()
    assert states(stage) == ["restarting"]
    process.returncode = -9
    stage.fleet.step()
    assert states(stage) == ["starting"]


def test_a_defect_in_the_engines_own_thread_ends_it_with_its_reason(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = play()
    stage.begin("a")
    monkeypatch.setattr(stage.fleet, "step", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        stage.fleet.run()
    assert stage.ends() == ["engine_closed"] and states(stage) == ["failed"]
    with pytest.raises(NotReadyError, match="own thread failed \\(ZeroDivisionError"):
        stage.begin("b")


def test_questions_go_to_a_group_that_has_time(play: Any) -> None:
    stage = play(data_parallel_size=2)
    stage.begin()
    stage.fleet.check(GenerationRequest(prompt="x"))
    stage.fleet.step()
    assert [name for name, message in stage.post.told if isinstance(message, Check)] == ["1.0.0"]


def test_questions_go_to_a_rank_and_are_answered_or_refused(play: Any) -> None:
    stage = play()
    answers = [stage.fleet.check(GenerationRequest(prompt="x")) for _ in range(2)]
    stage.fleet.step()
    questions = [message for _, message in stage.post.told if isinstance(message, Check)]
    stage.say(("0.0.0", Checked(number=questions[0].number)))
    assert answers[0].result(0).failure is None and not answers[1].done()
    stage.groups[0].ranks[0].process.returncode = 1
    stage.fleet.step()
    with pytest.raises(NotReadyError, match="died"):
        answers[1].result(0)
    later = stage.fleet.check(GenerationRequest(prompt="x"))
    stage.fleet.step()
    with pytest.raises(NotReadyError, match="no group"):
        later.result(0)


def test_all_ranks_of_a_group_are_told_of_a_cancelled_order(play: Any) -> None:
    stage = play(ulysses_degree=2)
    stage.begin()
    stage.fleet.cancel("a")
    stage.fleet.cancel("unknown")
    stage.fleet.step()
    assert [name for name, message in stage.post.told if message == Cancel("a")] == ["0.0.0", "0.0.1"]
    file = MadeFile(item=0, path="", kind="image", media_type="", num_bytes=0, seed=0)
    stage.say(("0.0.0", Made(id="a", file=file)), ("0.0.0", Ended(id="a")), ("0.0.0", Idle()), ("0.0.1", Idle()))
    assert stage.ends() == ["cancelled"] and not any(isinstance(event, Made) for event in stage.heard)


def test_closing_ends_everything_once(play: Any) -> None:
    stage = play()
    stage.begin("a")
    stage.begin("b")
    question = stage.fleet.check(GenerationRequest())
    stage.fleet.close()
    stage.fleet.run()
    assert stage.ends() == ["engine_closed"] * 2 and states(stage) == ["failed"]
    with pytest.raises(NotReadyError):
        question.result(0)
    with pytest.raises(NotReadyError, match="closed"):
        stage.begin("c")

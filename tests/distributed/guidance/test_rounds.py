"""Rounds: who executes what, and that every result is right on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.guidance.futures import FutureTensor, wait
from penstock.distributed.guidance.rounds import OutputForm, Rounds, rounds_of
from penstock.distributed.mesh import build_mesh
from penstock.errors import GenerationError
from tests.ranks import RankError, run_ranks


def group_of(size: int) -> Group:
    group = build_mesh(ParallelConfig(cfg_parallel_size=size), "cpu")["cfg"]
    group.traffic.clear()
    return group


class Log:
    """Makes calls whose results are their numbers, and remembers which were executed."""

    def __init__(self) -> None:
        self.executed: list[int] = []

    def call(self, number: int, *shape: int) -> Callable[[], Tensor]:
        def execute() -> Tensor:
            self.executed.append(number)
            return torch.full(shape or (3,), float(number))

        return execute


FORM = OutputForm.of(torch.zeros(3))


def full_rounds(size: int) -> Any:
    rounds, log = Rounds(group_of(size)), Log()
    results = [rounds.add(log.call(number), FORM) for number in range(2 * size)]
    assert not any(result.is_pending for result in results)
    return [result.tolist()[0] for result in results], log.executed, rounds.group.traffic


@pytest.mark.parametrize("size", [2, 3])
def test_calls_go_by_turns(size: int) -> None:
    for rank, (results, executed, traffic) in enumerate(run_ranks(size, full_rounds, size)):
        assert results == [*range(2 * size)]
        assert executed == [rank, rank + size]
        assert traffic.num_calls == {"all_gather": 2}
        assert traffic.received_bytes["all_gather"] == 2 * (size - 1) * 12


def early(size: int) -> Any:
    rounds, log = Rounds(group_of(size)), Log()
    first = rounds.add(log.call(7), FORM) * 2
    assert first.is_pending
    value = float(first.sum())  # nobody has made a second call
    rest = [rounds.add(log.call(number), FORM) for number in (8, 9)]
    rounds.close()
    return value, [float(part[0]) for part in rest], log.executed, rounds.group.traffic.num_calls


def test_a_result_that_is_needed_closes_its_round() -> None:
    for rank, (value, rest, executed, num_calls) in enumerate(run_ranks(3, early, 3)):
        assert (value, rest) == (42.0, [8.0, 9.0])
        assert executed == [[7, 8], [9], []][rank]
        assert num_calls == {"broadcast": 3}


def unread() -> Any:
    rounds, log = Rounds(group_of(2)), Log()
    rounds.add(log.call(1), FORM)
    rounds.add(log.call(2), FORM)
    last = rounds.add(log.call(3), FORM)
    rounds.close()
    rounds.close()
    return last.is_pending, last.tolist(), rounds.group.traffic.num_calls


def test_results_that_nobody_reads_are_exchanged_too() -> None:
    assert run_ranks(2, unread) == [(False, [3.0] * 3, {"all_gather": 1, "broadcast": 1})] * 2


def shapes() -> Any:
    rounds, log = Rounds(group_of(2)), Log()
    a = rounds.add(log.call(1, 2, 5), OutputForm.of(torch.zeros(2, 5)))
    b = rounds.add(log.call(2, 0), OutputForm.of(torch.zeros(0)))
    c = rounds.add(log.call(3, 0), OutputForm.of(torch.zeros(0)))
    d = rounds.add(log.call(4, 0), OutputForm.of(torch.zeros(0)))
    return [tuple(x.shape) for x in wait([a, b, c, d])], a.sum().item(), rounds.group.traffic.num_calls


def test_calls_of_a_round_may_return_different_shapes_or_nothing() -> None:
    expected = [(2, 5), (0,), (0,), (0,)], 10.0, {"broadcast": 2, "all_gather": 1}
    assert run_ranks(2, shapes) == [expected] * 2


def awkward(number: int) -> Any:
    """An output of many kinds: strides of its own, not its own memory, bits, eight-bit floats, constants."""
    table = torch.arange(24.0).reshape(2, 3, 4) + 100 * number
    return {
        "turned": table.permute(2, 0, 1),
        "cut": table[:, :, 1:3],
        "spread": table[:1, :1].expand(2, 3, 4),
        "bits": table > 5,
        "small": table.to(torch.float8_e4m3fn),
        "rest": (None, 3, "text"),
    }


def kinds() -> Any:
    rounds, form = Rounds(group_of(2)), OutputForm.of(awkward(0))
    assert form is not None
    outputs = [rounds.add(lambda number=number: awkward(number), form) for number in (1, 2)]
    for number, output in zip((1, 2), wait(outputs), strict=True):
        for name, value in awkward(number).items():
            if name == "rest":
                assert output[name] == value
            else:
                assert output[name].dtype == value.dtype
                assert torch.equal(output[name].float(), value.float()), name
    return [output[name].stride() for output in wait(outputs) for name in ("turned", "cut", "spread")]


def test_outputs_of_every_kind_arrive_with_one_layout_on_all_ranks() -> None:
    first, second = run_ranks(2, kinds)
    assert first == second == [(1, 12, 4), (6, 2, 1), (12, 4, 1)] * 2


def test_what_cannot_be_sent_has_no_form() -> None:
    assert OutputForm.of((torch.zeros(1), object())) is None


def another_form() -> None:
    rounds, log = Rounds(group_of(2)), Log()
    rounds.add(log.call(1, 4), FORM)
    rounds.close()


def test_an_output_of_another_form_is_an_error_on_the_rank_that_has_it() -> None:
    with pytest.raises(RankError, match=r"returned \(4,\) torch.float32, where .* \(3,\) torch.float32"):
        run_ranks(2, another_form)


def together() -> Any:
    rounds, log = Rounds(group_of(2)), Log()
    weights, others = object(), object()
    a = rounds.add(log.call(1), FORM, together=weights)
    b = rounds.add(log.call(2), FORM, together=others)  # weights of its own: the first round closes
    c = rounds.add(log.call(3), FORM, together=others)
    d = rounds.add(log.call(4), FORM)
    rounds.close()
    return [float(x[0]) for x in (a, b, c, d)], log.executed


def test_ranks_that_hold_weights_together_execute_as_many_calls() -> None:
    (first, executed), (second, beside) = run_ranks(2, together)
    assert first == second == [1.0, 2.0, 3.0, 4.0]
    assert executed == [1, 2, 4]
    assert beside == [1, 3]


def run() -> Any:
    rounds, log = Rounds(group_of(2)), Log()
    told = [rounds.is_running]
    with rounds.run():
        first = rounds.add(log.call(1), FORM)
        with rounds.run():
            inner = rounds.add(log.call(2, 5), OutputForm.of(torch.zeros(5)))
            second = rounds.add(log.call(3), FORM)
        told += [rounds.is_running, second.is_pending]
        last = rounds.add(log.call(4), FORM)
        told.append(last.is_pending)
    told += [rounds.is_running, last.is_pending]
    with pytest.raises(KeyError), rounds.run():
        lost = rounds.add(log.call(5), FORM)
        raise KeyError
    with pytest.raises(GenerationError, match="is lost"):
        lost.tolist()
    return told, [float(result[0]) for result in (first, inner, second, last)]


def test_a_run_leaves_nothing_pending_and_forgets_what_failed() -> None:
    told = [False, True, False, True, False, False]
    assert run_ranks(2, run) == [(told, [1.0, 2.0, 3.0, 4.0])] * 2


def failing() -> Any:
    group = group_of(2)
    rounds = Rounds(group)
    first = rounds.add(lambda: torch.zeros(3), FORM)
    if group.rank == 1:
        with pytest.raises(ZeroDivisionError):
            rounds.add(lambda: 1 / 0, FORM)
    rounds.drop()
    with pytest.raises(GenerationError, match="is lost.*Run the pipeline again"):
        first.tolist()
    return full_rounds(2)[0]


def test_after_a_failure_the_next_run_works() -> None:
    assert run_ranks(2, failing) == [[0.0, 1.0, 2.0, 3.0]] * 2


def shared() -> Any:
    group = group_of(2)
    left, right = rounds_of(group), rounds_of(build_mesh(ParallelConfig(cfg_parallel_size=2), "cpu")["cfg"])
    log = Log()
    results = [left.add(log.call(1), FORM), right.add(log.call(2), FORM)]
    return left is right, [result.is_pending for result in results], log.executed


def test_two_models_of_a_pipeline_share_the_rounds_of_their_group() -> None:
    assert run_ranks(2, shared) == [(True, [False, False], [1]), (True, [False, False], [2])]


def dropped() -> list[float]:
    def zeros(self: Group, tensor: Tensor) -> list[Tensor]:
        return [tensor if rank == self.rank else torch.zeros_like(tensor) for rank in range(self.size)]

    with patch.object(Group, "all_gather", zeros):
        return full_rounds(2)[0]


def test_a_lost_result_would_be_noticed() -> None:
    assert run_ranks(2, dropped) == [[0.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 3.0]]


def modes() -> Any:
    rounds = Rounds(group_of(2))
    weight = torch.ones(3, requires_grad=True)
    results = []
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            a, b = (rounds.add(lambda number=number: weight * number, FORM) for number in (1, 2))
            results.append((a - 2 * b).add_(1).tolist()[0])
            assert isinstance(a, FutureTensor) and not a.requires_grad
    return results


def test_in_every_gradient_mode() -> None:
    assert run_ranks(2, modes) == [[-2.0] * 3] * 2

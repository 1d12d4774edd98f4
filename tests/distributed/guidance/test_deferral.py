"""Calls that are put off: what they compute, when, and which ones are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.distributed.guidance.deferral import Deferral, apply_deferral
from penstock.distributed.guidance.futures import FutureTensor, wait
from penstock.errors import GenerationError

X = torch.arange(6.0).reshape(2, 3)


class Denoiser(nn.Module):
    """Scales its sample, and notes when; `act` does something else in between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[float] = []
        self.act: Callable[[Tensor], Any] = lambda x: None

    def forward(self, x: Tensor, factor: float = 1.0, extra: Any = None) -> Any:
        self.seen.append(factor)
        acted = self.act(x)
        return x * factor if acted is None else acted


class Log:
    """Makes calls one after the other, and notes how many at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.within: list[bool] = []

    def run(self, calls: Any, is_within: bool) -> list[Any]:
        self.sizes.append(len(calls))
        self.within.append(is_within)
        return [call() for call in calls]


@contextmanager
def deferred(must_match: bool = False) -> Iterator[tuple[Denoiser, Deferral, Log]]:
    """A denoiser whose calls are put off; those with a sample like `X` are known."""
    denoiser, log = Denoiser().eval(), Log()
    deferral = Deferral(log.run, must_match)
    undo = apply_deferral(denoiser, deferral)
    try:
        with torch.no_grad(), deferral.run():
            for arguments in ({}, {"factor": 0.0}):  # two kinds of calls
                denoiser(X, **arguments)
            denoiser.seen.clear()
            yield denoiser, deferral, log
    finally:
        undo.run()
        assert type(denoiser) is Denoiser


def test_calls_wait_until_a_value_is_needed_and_are_made_together() -> None:
    with deferred() as (denoiser, deferral, log):
        one, two = denoiser(X, factor=2.0), denoiser(X, factor=3.0)
        guided = one + 4 * (two - one)
        assert isinstance(guided, FutureTensor) and denoiser.seen == [] and deferral.num_pending == 2
        assert torch.equal(X + guided, X + (2 * X + 4 * (3 * X - 2 * X))) and denoiser.seen == [2.0, 3.0]
        assert log.sizes == [2] and deferral.num_pending == 0
        assert torch.equal(one, 2 * X) and log.sizes == [2]  # nothing is made twice


def test_the_first_call_of_a_kind_is_made_at_once_and_those_of_other_sizes_are_learnt_anew() -> None:
    with deferred() as (denoiser, _, log):
        assert type(denoiser(X[:1])) is Tensor and denoiser.seen == [1.0]
        assert isinstance(denoiser(X[:1]), FutureTensor)
    assert log.sizes == [1]


def test_whether_an_operation_waits_is_told() -> None:
    with deferred() as (denoiser, _, log):
        X.clone().add_(denoiser(X))
        wait(denoiser(X))
        denoiser(X).tolist()
        X.clone().add_(denoiser(X))
    assert log.within == [True, False, False, True]


def test_what_nobody_needs_is_made_at_the_end() -> None:
    with deferred() as (denoiser, _, log):
        denoiser(X, factor=5.0)
    assert log.sizes == [1] and denoiser.seen == [5.0]


def test_outside_of_a_run_and_on_other_threads_calls_are_made_at_once() -> None:
    with deferred() as (denoiser, deferral, log):
        found: list[Any] = []

        def elsewhere() -> None:
            with torch.no_grad():
                found.append(denoiser(X, factor=7.0))
            with pytest.raises(GenerationError, match="another thread"), deferral.run():
                pass

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(timeout=60)
        assert type(found[0]) is Tensor and log.sizes == []
    undo = apply_deferral(denoiser, deferral)
    assert type(denoiser(X)) is Tensor
    undo.run()


def test_arguments_may_be_changed_after_the_call() -> None:
    with deferred() as (denoiser, _, _):
        x, words = X.clone(), {"mask": [torch.ones(1)]}
        one = denoiser(x, factor=2.0, extra=words)
        x.add_(100.0)
        words.clear()
        assert torch.equal(X + one, X + 2 * X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_sees_torch_as_it_was_though_it_is_made_within_an_operation(mode: Any) -> None:
    states: list[Any] = []

    def look(x: Tensor) -> None:
        keys = torch._C._dispatch_tls_local_exclude_set().raw_repr()
        states.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), keys))
        z = torch.view_as_complex(torch.ones(2, 2)).conj()
        states.append(torch.view_as_real(z.resolve_conj()).tolist())  # wrong where these keys are excluded

    with mode(), deferred() as (denoiser, _, _):
        denoiser.act = look
        look(X)
        one = denoiser(X)
        X.clone().add_(one)  # within torch's dispatch
        assert len(states) == 4 and states[:2] == states[2:]


def test_calls_of_other_surroundings_or_of_another_denoiser_are_not_made_together() -> None:
    with deferred() as (denoiser, deferral, log):
        other = Denoiser().eval()
        undo = apply_deferral(other, deferral)
        other(X)
        denoiser(X)
        other(X)
        assert log.sizes == [1]
        with torch.inference_mode():
            other(X)
        assert log.sizes == [1, 1]
        undo.run()
    assert log.sizes == [1, 1, 1]


@pytest.mark.parametrize("must_match", [False, True])
def test_calls_of_other_sizes_go_together_unless_all_must_be_the_same(must_match: bool) -> None:
    denoiser, log = Prompted(), Log()
    deferral = Deferral(log.run, must_match)
    undo = apply_deferral(denoiser, deferral)
    with torch.no_grad(), deferral.run():
        for length in (1, 1, 2, 2):
            denoiser(X, encoder_hidden_states=torch.ones(length))
    undo.run()
    assert log.sizes == ([1, 2] if must_match else [3])


class Prompted(nn.Module):
    """Has an argument that the size of the prediction does not depend on."""

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return x * encoder_hidden_states.sum()


class Thing:
    """Neither a tensor nor a constant."""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"extra": Thing()}, "a Thing, which may change"), ({"extra": [torch.Generator()]}, "a Generator")],
)
def test_a_call_with_something_that_may_change_is_made_at_once(arguments: dict[str, Any], reason: str) -> None:
    with deferred() as (denoiser, deferral, log):
        denoiser(X, factor=8.0)
        assert type(denoiser(X, factor=9.0, **arguments)) is Tensor
        assert denoiser.seen == [8.0, 9.0] and log.sizes == [1]  # in their order
        assert [reason in told for told in deferral.single] == [True]


def test_a_denoiser_that_draws_random_numbers_is_not_put_off() -> None:
    with deferred() as (denoiser, deferral, _):
        denoiser.act = lambda x: torch.rand_like(x)
        for _ in range(2):
            assert type(denoiser(X[:1])) is Tensor
        assert [*deferral.single] == ["the denoiser draws random numbers, or returns more than tensors"]


def test_autocast_modes_and_compiled_denoisers_are_not_put_off() -> None:
    with deferred() as (denoiser, deferral, _):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert type(denoiser(X)) is Tensor
        with torch.device("cpu"):
            assert type(denoiser(X)) is Tensor
        denoiser._compiled_call_impl = denoiser._call_impl
        assert type(denoiser(X)) is Tensor
        denoiser._compiled_call_impl = None
        assert len(deferral.single) == 3


def test_a_denoiser_that_is_changed_before_its_call_is_made_is_an_error() -> None:
    with deferred() as (denoiser, _, log):
        one = denoiser(X)
        handle = denoiser.linear.register_forward_hook(lambda *_: None)
        with pytest.raises(GenerationError, match="hooks, processors or adapters of Denoiser were changed"):
            X.clone().add_(one)
        assert log.sizes == []
        handle.remove()
        assert torch.equal(X + denoiser(X), 2 * X)


def test_another_form_than_before_is_an_error() -> None:
    with deferred() as (denoiser, _, _):
        denoiser.act = lambda x: torch.zeros(5)
        one = denoiser(X)
        with pytest.raises(GenerationError, match="another form"):
            X.clone().add_(one)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_call_raises_comes_where_its_value_is_needed(error: type[BaseException]) -> None:
    def fail(x: Tensor) -> None:
        raise error("within")

    with deferred() as (denoiser, _, _):
        one, two = denoiser(X), denoiser(X)
        denoiser.act = fail
        with pytest.raises(error, match="within"):
            X.clone().add_(one)
        with pytest.raises(GenerationError, match="is lost"):
            X.clone().add_(two)
        denoiser.act = lambda x: None
        assert torch.equal(X + denoiser(X), 2 * X)


def test_after_an_exception_nothing_is_left_to_be_made() -> None:
    with pytest.raises(ZeroDivisionError), deferred() as (denoiser, deferral, log):
        denoiser(X)
        raise ZeroDivisionError
    assert log.sizes == [] and deferral.num_pending == 0 and not deferral.is_running


def test_each_call_that_is_put_off_is_announced_when_it_is() -> None:
    told: list[str] = []
    denoiser, deferral = Denoiser().eval(), Deferral(Log().run)
    undo = apply_deferral(denoiser, deferral, lambda: told.append("announced"))
    with torch.no_grad(), deferral.run():
        for count in (0, 1, 2):
            denoiser(X)
            assert len(told) == count
    undo.run()


def test_strides_of_what_is_returned_are_the_real_ones() -> None:
    with deferred() as (denoiser, _, _):
        denoiser.act = lambda x: {"sample": torch.ones(2, 5, 4)[:, 1:3].transpose(1, 2)}
        for _ in range(2):
            found = denoiser(X[:, :2])["sample"]
        assert isinstance(found, FutureTensor) and found.stride() == (20, 1, 4)
        assert not found.is_contiguous()

"""What others' functions may do, read from their code."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.models.callables import habits_of, home_of, is_of_library, name_of

COUNTS = [0]
TOTAL = 0
TABLE = torch.zeros(3)


class Net(nn.Module):
    """Something to put functions on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.log: list[Any] = []
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)  # its own business
        return x


class Store:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: Any = None

    def keep(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


class Ledger:
    """Keeps it for all of its kind."""

    seen: list[Any] = []  # noqa: RUF012


class Scaler:
    """Holds a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


def put_on(make: Callable[[Any], Any]) -> Any:
    net = Net()
    return make(net), net


def by_global(x: Tensor) -> Tensor:
    COUNTS[0] += 1
    return x


def by_rebound_global(x: Tensor) -> Tensor:
    global TOTAL
    TOTAL += 1
    return x


def by_table(x: Tensor) -> Tensor:
    TABLE[0] = x[0]
    return x


def by_class(x: Tensor) -> Tensor:
    Ledger.seen.append(x)
    return x


def by_helper(x: Tensor) -> Tensor:
    return by_global(x)


def by_default(x: Tensor, memo: dict[str, Any] = {}) -> Tensor:  # noqa: B006
    return memo.get("x", x)


def by_own_name(x: Tensor) -> Tensor:
    by_own_name.count = 1  # type: ignore[attr-defined]
    return x


def by_setattr(x: Tensor) -> Tensor:
    setattr(TABLE, "count", 1)  # noqa: B010
    return x


def closure(net: Net) -> Any:
    count = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * count

    return forward


def iterator(net: Net) -> Any:
    numbers, stock = itertools.count(), net.forward
    return lambda x: stock(x) * next(numbers)


def attribute(net: Net) -> Any:
    def forward(self: Net, x: Tensor) -> Tensor:
        self.num_calls = getattr(self, "num_calls", 0) + 1
        return x

    return forward.__get__(net)


def buffer(net: Net) -> Any:
    def forward(x: Tensor) -> Tensor:
        net.steps[0] = 1
        return x

    return forward


def list_of_the_module(net: Net) -> Any:
    def forward(x: Tensor) -> Tensor:
        net.log.append(x)
        return x

    return forward


def in_no_grad(net: Net) -> Any:
    kept = {}

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        kept["x"] = x
        return x

    return forward


def in_a_partial(net: Net) -> Any:
    return partial(lambda store, x: store.keep(x), Store())


def bound_methods_of_c(net: Net) -> Any:
    kept: list[Any] = []
    push = kept.append

    def forward(x: Tensor) -> Tensor:
        push(x)
        return x

    return forward


def wrapped_method_of_c(net: Net) -> Any:
    tick = itertools.count().__next__
    return lambda x: x * tick()


def result_in_what_is_there(net: Net) -> Any:
    kept = torch.zeros(3)
    return lambda x: x * torch.add(kept, 1.0, out=kept)


def draws_of_torch(net: Net) -> Any:
    return lambda x: x + torch.randn_like(x)


def draws_of_python(net: Net) -> Any:
    return lambda x: x if random.random() < 0.5 else x * 2


STATEFUL: list[Callable[[Any], Any]] = [
    *(closure, iterator, attribute, buffer, list_of_the_module, in_no_grad, in_a_partial),
    *(bound_methods_of_c, wrapped_method_of_c, result_in_what_is_there, draws_of_torch, draws_of_python),
    *(
        lambda _, f=f: f
        for f in (
            by_global,
            by_rebound_global,
            by_table,
            by_class,
            by_helper,
            by_default,
            by_own_name,
            by_setattr,
            Store().keep,
        )
    ),
]


@pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)
def test_what_may_last_until_the_next_call_is_state(make: Callable[[Any], Any]) -> None:
    function, net = put_on(make)
    assert habits_of(function, net).keeps_state


def timed(net: Net) -> Any:
    stock = net.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = stock(*args, **kwargs)
        print(f"{time.perf_counter() - begun:.1f} s")
        return result

    return forward


def scaled(net: Net) -> Any:
    stock, scaler = net.forward, Scaler(0.5)
    return lambda x: scaler(stock(x)) * net.scale


def compiled(net: Net) -> Any:
    return torch.compile(net.forward, backend="eager")


@pytest.mark.parametrize("make", [timed, scaled, compiled])
def test_what_keeps_nothing_is_cleared(make: Callable[[Any], Any]) -> None:
    function, net = put_on(make)
    assert not habits_of(function, net).keeps_state
    assert not habits_of(function, net).looks_across


def test_what_looks_from_one_number_to_another_is_told() -> None:
    for function in (lambda x: x - x.mean(), lambda x: x @ x, lambda x: x[:1] + x, lambda x: torch.cat([x, x])):
        habits = habits_of(function)
        assert habits.looks_across and not habits.keeps_state


def test_who_only_watches_is_told() -> None:
    seen: list[Any] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output)

    def change(module: Any, args: Any, output: Any) -> None:
        output[:, :1] = seen[0]

    def in_place(module: Any, args: Any, output: Any) -> None:
        output.mul_(2)

    def replace(module: Any, args: Any, output: Any) -> Any:
        return seen[0] if seen else None

    class Counter:
        num_calls = 0

        def __call__(self, module: Any, args: Any, output: Any) -> None:
            self.num_calls += 1

    assert habits_of(note).only_watches and habits_of(lambda *_: seen.append(1)).only_watches
    assert habits_of(Counter()).only_watches and habits_of(lambda *given: print(given[2].shape)).only_watches
    assert not any(habits_of(hook).only_watches for hook in (change, in_place, replace))


def test_a_home_is_that_of_the_code() -> None:
    net = Net()
    disguised = functools.wraps(nn.Linear.forward)(lambda x: x)
    disguised.__module__ = "torch.nn"
    assert home_of(disguised) == __name__ and not is_of_library(disguised)
    assert home_of(partial(net.forward)) == __name__
    assert is_of_library(torch.compile(nn.Linear(1, 1).forward, backend="eager"))
    assert is_of_library(print) and is_of_library(nn.Linear.forward) and not is_of_library(Store())
    assert name_of(disguised).endswith("test_a_home_is_that_of_the_code.<locals>.<lambda>")

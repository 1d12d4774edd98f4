"""Somebody else makes the calls of one object, whose class stays."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penstock.interception import Make, intercept


class Adder(nn.Module):
    """Adds something."""

    def forward(self, x: int, y: int = 1) -> int:
        return x + y


class Heir(Adder):
    """Inherits the call."""


class Own:
    """Has a call of its own, and a method."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __call__(self, x: int, *, more: int = 0) -> int:
        return self.start + x + more

    def step(self, x: int) -> int:
        return self.start + x


def times(factor: int) -> Make:
    def make(execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factor * execute(*args, **kwargs)

    return make


def test_one_object_is_intercepted_and_keeps_its_class() -> None:
    for kind in (Adder, Own):
        one, other = kind(), kind()
        stock, was_own = kind.__call__, "__call__" in vars(kind)
        plain = other(1)
        undo = intercept(one, "__call__", times(10))
        assert type(one) is kind and one(1) == 10 * plain and other(1) == plain
        assert inspect.signature(kind.__call__) == inspect.signature(stock)
        undo.run()
        undo.run()
        assert one(1) == plain and kind.__call__ is stock and ("__call__" in vars(kind)) is was_own
        assert not [name for name in vars(one) if "penstock" in name]


def test_what_came_last_is_asked_first_and_each_is_taken_back_alone() -> None:
    own = Own()

    def more(execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return execute(*args, **kwargs) + 1

    first, second = intercept(own, "__call__", times(10)), intercept(own, "__call__", more)
    assert own(2, more=1) == 31
    first.run()
    assert own(2) == 3
    second.run()
    assert own(2) == 2


def test_a_class_and_its_heir_are_intercepted_apart() -> None:
    heir, adder = Heir(), Adder()
    first = intercept(adder, "__call__", times(10))
    second = intercept(heir, "__call__", times(3))
    assert (heir(1), adder(1)) == (6, 20)
    first.run()
    assert (heir(1), adder(1)) == (6, 2)
    third = intercept(adder, "__call__", times(10))
    second.run()
    assert (heir(1), adder(1)) == (2, 20)
    third.run()
    assert Adder.__call__ is Heir.__call__ is nn.Module.__call__


def test_somebody_elses_wrapper_stays_and_is_run_once() -> None:
    own, seen = Own(), []
    first = intercept(own, "__call__", times(10))
    inner = Own.__call__

    def theirs(self: Own, *args: Any, **kwargs: Any) -> int:
        seen.append(args)
        return inner(self, *args, **kwargs)

    stock = inner.__wrapped__  # type: ignore[attr-defined]
    try:
        Own.__call__ = theirs  # type: ignore[method-assign]
        second = intercept(own, "__call__", times(2))
        assert own(1) == 20 and seen == [(1,)]
        second.run()
        assert Own.__call__ is theirs
        first.run()
        assert own(1) == 1 and Own.__call__ is theirs
    finally:
        Own.__call__ = stock  # type: ignore[method-assign]


def test_copies_and_pickles_are_not_intercepted_but_where_that_is_asked_for() -> None:
    own, adder = Own(1), Adder()
    undo = intercept(own, "__call__", times(10))
    others = intercept(adder, "__call__", times(10))
    for twin in (copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))):
        assert type(twin(own)) is Own and twin(own)(1) == 2 and twin(adder)(1) == 2
    assert own(1) == 20
    steps = intercept(own, "step", times(10), with_copies=True)
    assert copy.deepcopy(own).step(1) == copy.copy(own).step(1) == own.step(1) == 20
    left = copy.deepcopy(own)
    for one in (undo, others, steps):
        one.run()
    assert left.step(1) == 2


def test_a_copy_can_be_intercepted_by_itself() -> None:
    own = Own()
    undo = intercept(own, "__call__", times(10))
    twin = copy.copy(own)
    other = intercept(twin, "__call__", times(3))
    assert (own(1), twin(1)) == (10, 3)
    undo.run()
    assert (own(1), twin(1)) == (1, 3)
    other.run()
    assert twin(1) == 1


def test_an_object_that_ends_gives_its_class_the_method_back() -> None:
    own, stock = Own(), Own.__call__
    undo = intercept(own, "__call__", times(10))
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None and Own.__call__ is stock
    undo.run()
    assert Own.__call__ is stock


def test_threads_come_and_go() -> None:
    stock, wrong = Own.__call__, []

    def work() -> None:
        for number in range(200):
            own = Own(number)
            undo = intercept(own, "__call__", times(2))
            if own(1) != 2 * (number + 1):
                wrong.append(number)
            undo.run()
            if own(1) != number + 1:
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and Own.__call__ is stock


def test_hooks_run_inside_and_other_modules_can_still_be_compiled_whole() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    one, other, seen = Net(), Net(), []
    one.register_forward_hook(lambda *_: seen.append("hook"))

    def make(execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append("make")
        return execute(*args, **kwargs)

    undo = intercept(one, "__call__", make)
    x = torch.ones(2)
    assert torch.equal(one(x), 2 * x) and seen == ["make", "hook"]
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
    undo.run()

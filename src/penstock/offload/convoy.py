"""Calls that advance block by block together, so that a streamed block is moved once for all of them.

Each call runs in a greenlet of its own: one thread, one stack of frames per call. At the entry of a streamed block it
is put aside until the others have come to the same block, or have ended, or are farther on; then they pass through it
one after another. Owns who goes on. Does not know weights, nor why the calls are made together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet


class EndedError(Exception):
    """Raised within a call whose convoy has failed; what the others raised is what the user sees."""


class Convoy:
    """Calls on their way through the same blocks; outside of `run` it lets everybody pass.

    Attributes:
        num_together: calls so far that were made with others.
    """

    def __init__(self) -> None:
        self._hub: greenlet | None = None
        self._calls: list[_Call] = []
        self._going: _Call | None = None
        self._surroundings: Hashable = None
        self._due: Counter[Hashable] = Counter()  # by block: calls that are still to leave it
        self._inside: Counter[Hashable] = Counter()  # by component: calls that run in it
        self._is_ending = False
        self.num_together = 0

    @property
    def is_going(self) -> bool:
        """Whether the code that asks runs within one of several calls."""
        return self._going is not None and self._going.is_current

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Make calls together.

        Each begins in the order given, in a copy of the present context, and sees the same state of torch (grad mode,
        autocast, modes) as the code that calls this. Between two streamed blocks the others stand still; what the
        calls share and change, such as the random state, they change in another order than one after the other.

        Args:
            calls: without arguments; none of them waits for another.

        Returns:
            What they return, in their order.

        Raises:
            Whatever the first call raises that fails: the others are ended where they stand, by `EndedError`.

        Cost: the intermediate tensors of all calls at once; microseconds per block.
        """
        if self._hub is not None:
            return [call() for call in calls]
        self._hub = getcurrent()
        self._surroundings = _surroundings()
        self._calls = [_Call(call) for call in calls]
        try:
            while waiting := [call for call in self._calls if not call.greenlet.dead]:
                self._let_pass(waiting)
            self.num_together += len(calls) if len(calls) > 1 else 0
            return [call.output for call in self._calls]
        finally:
            self._end()

    def _let_pass(self, waiting: Sequence[_Call]) -> None:
        """Let those go on that are farthest behind: all that wait for the same block, one after another."""
        last = min(waiting, key=lambda call: call.place)
        together = [last] if last.block is None else [call for call in waiting if call.block == last.block]
        if last.block is not None:
            self._due[last.block] = len(together)
        for call in together:
            call.is_first = call is last
            self._resume(call)

    def _resume(self, call: _Call) -> None:
        self._going = call
        try:
            call.greenlet.switch()
        finally:
            self._going = None

    def _end(self) -> None:
        """End what has not ended; one that cannot be ended does not keep the others."""
        self._is_ending = True
        with ExitStack() as stack:
            stack.callback(self._forget)
            for call in self._calls:
                stack.callback(self._throw, call)

    def _throw(self, call: _Call) -> None:
        if not call.greenlet or call.greenlet.dead:
            return  # never begun, or over
        self._going = call
        try:
            call.greenlet.throw(EndedError)
        except EndedError:
            pass
        finally:
            self._going = None

    def _forget(self) -> None:
        self._hub, self._calls, self._is_ending = None, [], False
        self._due.clear()
        self._inside.clear()

    def arrive(self, block: Hashable, place: int) -> bool:
        """A call is about to enter a streamed block: it is put aside until it is its turn.

        Not so within another block, and not where torch's state is not the one that the convoy began in (a grad mode
        or function mode of the call's own): then it goes on alone.

        Args:
            block: the same for all calls.
            place: of the block in its component's order; the call with the least goes on first.

        Returns:
            Whether it is the first to enter, for which the block has to be fetched.
        """
        call = self._going
        if call is None or not call.is_current:
            return True
        if self._is_ending:
            raise EndedError
        if call.blocks or _surroundings() != self._surroundings:
            call.blocks.append((block, False))
            return True
        call.block, call.place = block, place
        assert self._hub is not None
        self._hub.switch()
        call.block = None
        call.blocks.append((block, True))
        return call.is_first

    def leave(self, block: Hashable) -> bool:
        """A call has left a streamed block.

        Returns:
            Whether no other call is still to enter it.
        """
        call = self._going
        if call is None or not call.is_current or self._is_ending or not call.blocks:
            return True
        block, is_shared = call.blocks.pop()
        if not is_shared:
            return not self._due[block]
        self._due[block] -= 1
        return not self._due[block]

    def begin(self, component: Hashable) -> bool:
        """A component begins to run; returns whether no other call is in it."""
        if not self.is_going:
            return True
        self._inside[component] += 1
        return self._inside[component] == 1

    def end(self, component: Hashable) -> bool:
        """A component has run; returns whether no other call is in it."""
        if not self.is_going or self._is_ending:
            return True
        self._inside[component] -= 1
        return self._inside[component] <= 0


class _Call:
    """One call of a convoy.

    Attributes:
        block: that it waits for; None before it begins.
        place: of that block in its component.
        is_first: whether it is the first of those that enter the block together.
        blocks: that it is in, and whether each was waited for with others.
        output: of the call, once it is over.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.greenlet = greenlet(self._run)
        self.greenlet.gr_context = copy_context()
        self.block: Hashable | None = None
        self.place = -1
        self.is_first = True
        self.blocks: list[tuple[Hashable, bool]] = []
        self.output: Any = None

    @property
    def is_current(self) -> bool:
        """Whether its greenlet is the one that runs, on this thread."""
        return getcurrent() is self.greenlet

    def _run(self) -> None:
        self.output = self._make()


def _surroundings() -> Hashable:
    """What torch keeps for a thread, and would keep for all calls of a convoy alike."""
    bindings, cuda = torch._C, cast("Any", torch.cuda)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        bindings._dispatch_tls_local_include_set().raw_repr(),
        bindings._dispatch_tls_local_exclude_set().raw_repr(),  # autocast is on where its key is not excluded
        bindings._len_torch_function_stack(),
        bindings._len_torch_dispatch_stack(),
        bindings._is_torch_function_enabled(),
        cuda.current_stream() if cuda.is_initialized() else None,
    )

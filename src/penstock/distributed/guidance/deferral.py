"""Calls of a denoiser that are put off until a result is needed, and then made together.

    call 1 -> futures, call 2 -> futures, guidance (recorded), the scheduler needs it -> both calls, block by block

Owns which calls may wait, and what of them is kept until then. Does not know how they are made together.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from penstock.distributed.guidance.calls import kind_of, named
from penstock.distributed.guidance.futures import FutureTensor, wait
from penstock.distributed.guidance.rounds import OutputForm, TensorForm
from penstock.distributed.guidance.surroundings import (
    Surroundings,
    hindrance,
    kept,
    random_state,
    settings_of,
    state_of_others,
)
from penstock.errors import GenerationError
from penstock.interception import intercept
from penstock.models.attachments import Attached
from penstock.undo import Undo

RunTogether = Callable[[Sequence[Callable[[], Any]], bool], list[Any]]
"""Makes calls that do not wait for each other, and returns what they return; told whether an operation of torch that
has its other arguments already is waiting for them."""

_INSTEAD = "Run the pipeline again without share_blocks."


def apply_deferral(denoiser: nn.Module, deferral: Deferral, announce: Callable[[], None] = lambda: None) -> Undo:
    """Put the calls of a denoiser off until their results are needed.

    The pipeline gets futures (`FutureTensor`) meanwhile and goes on to its next call. The first call of each kind, told
    by the sizes of the sample, is made at once, to learn what it returns. So is every call that could not be made
    later as it would be made now: under autocast, with a cache, with arguments that are neither tensors nor constants,
    of a denoiser that draws random numbers, or on which others have put something that keeps state.

    Only inside of `deferral.run()`, which surrounds the pipeline's call. Everything else about the denoiser, its
    class included, stays.

    Args:
        denoiser: of a pipeline; several share their deferral.
        deferral: makes the calls.
        announce: is told of each call that is put off, when it is.

    Returns:
        What takes it back.

    Cost: a copy of each call's arguments until it is made; some microseconds per module of the denoiser.
    """
    return intercept(denoiser, "__call__", _Calls(denoiser, deferral, announce).make)


@dataclass(eq=False)
class Pending:
    """A call that was put off.

    Attributes:
        denoiser: whose call it is.
        make: makes it.
        form: of what it will return.
        sizes: of its arguments.
        surroundings: torch's state where it was made.
        settings: of the denoiser there.
        context: of the program there.
        tensors: what it returned, once it has.
        futures: what was handed out in their place.
        is_made: whether it has been made.
    """

    denoiser: nn.Module
    make: Callable[[], Any]
    form: OutputForm
    sizes: Hashable
    surroundings: Surroundings = field(default_factory=Surroundings.now)
    settings: Hashable = ()
    context: Context = field(default_factory=copy_context)
    tensors: list[Tensor] = field(default_factory=list)
    futures: list[FutureTensor] = field(default_factory=list)
    is_made: bool = False

    def goes_with(self, other: Pending, must_match: bool) -> bool:
        """Whether both can be made together."""
        alike = self.denoiser is other.denoiser and self.surroundings == other.surroundings
        return alike and self.settings == other.settings and (self.sizes == other.sizes or not must_match)


class Deferral:
    """The calls of a pipeline that are put off.

    Args:
        run_together: makes them.
        must_match: together go only calls with arguments of the same sizes.

    Attributes:
        num_pending: calls that are put off and not made yet.
        single: why calls were made at once, and how many.
    """

    def __init__(self, run_together: RunTogether, must_match: bool = False) -> None:
        self._run_together = run_together
        self._must_match = must_match
        self._pending: list[Pending] = []
        self._thread: int | None = None  # on which calls are put off now
        self._is_making = False  # what calls call themselves is not put off
        self.single: Counter[str] = Counter()

    @property
    def is_running(self) -> bool:
        """Whether calls of this thread are put off now."""
        return self._thread == threading.get_ident() and not self._is_making

    @property
    def num_pending(self) -> int:
        """Calls that are put off and not made yet."""
        return len(self._pending)

    def add(self, call: Pending) -> Any:
        """Put a call off.

        Returns:
            What it will return, its tensors futures.
        """
        if self._pending and not call.goes_with(self._pending[-1], self._must_match):
            self.close()
        self._pending.append(call)
        for index, form in enumerate(call.form.tensors):
            resolve = partial(self._resolve, call, index)
            call.futures.append(FutureTensor.of(form.shape, form.dtype, form.device, resolve, strides=form.strides))
        return call.form.fill(call.futures)

    def _resolve(self, call: Pending, index: int) -> Tensor:
        if call in self._pending:
            self.close()
        if not call.is_made:
            raise GenerationError(
                f"the result of a denoiser's call, shape {call.form.tensors[index].shape}, is lost: a call that was "
                "made together with it failed, or the run was ended. Run the pipeline again."
            )
        return call.tensors[index]

    def close(self) -> None:
        """Make all calls that were put off.

        Raises:
            GenerationError: where the denoiser was changed meanwhile, or returns something of another form.
        """
        calls, self._pending = self._pending, []
        if not calls:
            return
        if settings_of(calls[0].denoiser) != calls[0].settings:
            raise GenerationError(
                f"hooks, processors or adapters of {type(calls[0].denoiser).__name__} were changed between a call and "
                f"the use of its result, and {len(calls)} calls that share blocks had not been made yet. {_INSTEAD}"
            )
        self._is_making = True
        is_within = Surroundings.now() != calls[0].surroundings  # torch's dispatch is in a state of its own
        try:
            with calls[0].surroundings.restored():
                outputs = self._run_together([partial(call.context.run, call.make) for call in calls], is_within)
        finally:
            self._is_making = False
        for call, output in zip(calls, outputs, strict=True):
            call.tensors = _tensors(output, call.form)
            call.is_made = True
        for future in [future for call in calls for future in call.futures]:
            future.value()  # and with it what was recorded: afterwards the results may be changed in place

    def at_once(self, make: Callable[[], Any], reason: str = "") -> Any:
        """Make a call now, after those that were put off."""
        self.close()
        if reason:
            self.single[reason] += 1
        return make()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A context around a pipeline's call: at its end what was put off is made, after an exception forgotten.

        Raises:
            GenerationError: while another thread is within it.
        """
        before, here = self._thread, threading.get_ident()
        if before not in (None, here):
            raise GenerationError(
                "this pipeline runs on another thread already. A placed pipeline runs on one thread at a time: wait "
                "for it, or place one of its own for each thread."
            )
        self.close()  # what a pipeline around this one has put off
        self._thread = here
        try:
            yield
            self.close()
        finally:
            self._pending = []
            self._thread = before


class _Calls:
    """The calls of one denoiser."""

    def __init__(self, denoiser: nn.Module, deferral: Deferral, announce: Callable[[], None]) -> None:
        self._denoiser, self._deferral, self._announce = denoiser, deferral, announce
        self._attached = Attached(denoiser)
        self._names = list(inspect.signature(type(denoiser).forward).parameters)[1:] or [""]
        self._forms: dict[Hashable, OutputForm | None] = {}

    def make(self, execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a call, or puts it off."""
        deferral = self._deferral
        if not deferral.is_running:
            return execute(*args, **kwargs)
        args, kwargs = wait((args, kwargs))
        call = partial(execute, *args, **kwargs)
        reason = hindrance(self._denoiser, (args, kwargs)) or state_of_others(self._attached.now())
        if reason:
            return deferral.at_once(call, reason)
        kind = kind_of(named(self._names, args, kwargs))
        if kind not in self._forms:
            output, self._forms[kind] = self._learn(call, (args, kwargs))
            return output
        form = self._forms[kind]
        if form is None:
            return deferral.at_once(call, "the denoiser draws random numbers, or returns more than tensors")
        args, kwargs = kept((args, kwargs))
        sizes = tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in tree_leaves((args, kwargs)))
        settings = settings_of(self._denoiser)
        output = deferral.add(
            Pending(self._denoiser, partial(execute, *args, **kwargs), form, sizes, settings=settings)
        )
        self._announce()
        return output

    def _learn(self, call: Callable[[], Any], arguments: Any) -> tuple[Any, OutputForm | None]:
        """Makes a call of a kind that was not seen before; its output, and the form of that if such calls may wait."""
        device = next((leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), None)
        before = random_state(device) if device is not None else b""
        output = self._deferral.at_once(call)
        if device is None or random_state(device) != before:
            return output, None
        leaves = tree_flatten(output)[0]
        if any(isinstance(leaf, Tensor) and (type(leaf) is not Tensor or leaf.requires_grad) for leaf in leaves):
            return output, None
        return output, _form(output)


def _form(output: Any) -> OutputForm | None:
    """The form of an output, with the strides that its tensors have."""
    form = OutputForm.of(output)
    if form is None:
        return None
    leaves = tree_flatten(output)[0]
    return OutputForm(form.tree, tuple(_exact(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))


def _exact(tensor: Tensor) -> TensorForm:
    return TensorForm(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _tensors(output: Any, form: OutputForm) -> list[Tensor]:
    """The tensors of an output of a form.

    Raises:
        GenerationError: for an output of another form.
    """
    if _form(output) != form:
        raise GenerationError(
            "a denoiser returned something of another form than with an earlier sample of the same shape, "
            f"which the pipeline has reckoned with. {_INSTEAD}"
        )
    return [leaf.detach() for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]

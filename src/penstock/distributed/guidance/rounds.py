"""Calls shared out among ranks: one each, all at once.

Owns who executes which call, and the exchange of results. Does not know what is called.

Every rank runs the same program and makes the same calls. They are grouped in rounds, a call for each rank: call j of
a round is executed by rank j, at the point of the program where it is made, with whatever context surrounds it there.
The other ranks get futures at once and go on to their own call. The round closes when it is full, or when somebody
needs a result, which happens at the same point of the program on every rank: then the results are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from penstock.distributed.group import Group
from penstock.distributed.guidance.futures import FutureTensor
from penstock.errors import GenerationError


@dataclass(frozen=True)
class TensorForm:
    """A tensor without its values.

    Attributes:
        shape: Its sizes.
        strides: Its own where it fills its memory; those of a copy that does, otherwise.
        dtype: Its dtype.
        device: Its device.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """The form of a tensor."""
        strides = torch.empty_like(tensor, device="meta").stride()
        return cls(tuple(tensor.shape), strides, tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        """A new tensor of this form."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class OutputForm:
    """What a call returns, without the values of its tensors.

    Attributes:
        tree: How the leaves are nested.
        leaves: The forms of the tensors, and constants as they are.
    """

    tree: TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, output: Any) -> Self | None:
        """The form of an output; None if it holds anything but tensors and constants, such as a cache."""
        leaves, tree = tree_flatten(output)
        if not all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves):
            return None
        return cls(tree, tuple(TensorForm.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def tensors(self) -> tuple[TensorForm, ...]:
        """The forms of the tensors."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorForm))

    def fill(self, tensors: Iterable[Tensor]) -> Any:
        """An output of this form with the given tensors."""
        given = iter(tensors)
        return tree_unflatten(
            [next(given) if isinstance(leaf, TensorForm) else leaf for leaf in self.leaves], self.tree
        )

    def take(self, output: Any) -> list[Tensor]:
        """The tensors of an output of this form, each filling its memory.

        Raises:
            GenerationError: If the output is of another form.
        """
        form = type(self).of(output)
        if form != self:
            raise GenerationError(
                f"A denoiser returned {_words(form)}, where earlier calls with a sample of the same shape returned "
                f"{_words(self)}. The other ranks went on with that, and cannot now. Use --cfg-parallel-size 1."
            )
        tensors = [leaf.detach() for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        return [
            tensor if tensor.stride() == wanted.strides else wanted.empty().copy_(tensor)
            for tensor, wanted in zip(tensors, self.tensors, strict=True)
        ]


@dataclass(eq=False)
class Turn:
    """A call in an open round, and its place there: that of the rank whose turn it is.

    Attributes:
        form: Of what it returns.
        again: Executes it, on ranks that must not stand still; None where they may.
        tensors: What it returned; at first only on the rank that executed it.
        futures: What was handed out in their place.
        is_exchanged: Whether every rank has the tensors.
    """

    form: OutputForm
    again: Callable[[], Any] | None
    tensors: list[Tensor] = field(default_factory=list)
    futures: list[FutureTensor] = field(default_factory=list)
    is_exchanged: bool = False


class Rounds:
    """The rounds of one group of ranks, one open at a time.

    Attributes:
        group: The ranks.
        is_running: Whether the ranks are inside of `run`.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.is_running = False
        self._calls: list[Turn] = []
        self._together: object = None

    def add(self, execute: Callable[[], Any], form: OutputForm, together: object = None) -> Any:
        """Makes a call: executes it if it is this rank's turn.

        Args:
            execute: Makes the call.
            form: Of what it will return.
            together: Given, ranks without a call of their own execute another's when a round closes early, so that
                every rank executes as many calls; a round then holds only calls that were given the same object.

        Returns:
            An output of the given form, its tensors futures.

        Cost: when the round closes, each rank receives the results of the others' calls: (size - 1) outputs.

        Raises:
            GenerationError: If this rank executed the call and the output is of another form.
        """
        self._begin(together)
        call = Turn(form, execute if together is not None else None)
        calls, self._calls = self._calls, []  # if this rank's execution raises, the round is lost
        if len(calls) == self.group.rank:
            call.tensors = form.take(execute())
        self._calls = calls
        return self._join(call)

    def learn(self, execute: Callable[[], Any], together: object = None) -> tuple[Any, OutputForm | None]:
        """Makes a call of which nobody knows what it returns: every rank executes it.

        It takes its place in the round like any other, so that the calls after it keep their ranks.

        Args:
            execute: Makes the call.
            together: As in `add`.

        Returns:
            Its output, the tensors futures; and its form, None if there is none. Then the output is as it is.
        """
        self._begin(together)
        if together is not None:
            self.close()
        output = execute()
        form = OutputForm.of(output)
        if form is None:
            return output, None
        return self._join(Turn(form, None, form.take(output), is_exchanged=True)), form

    def _begin(self, together: object) -> None:
        """A round holds only calls that were given the same object."""
        if self._together is not together:
            self.close()
        self._together = together

    def _join(self, call: Turn) -> Any:
        """Adds a call to the round; its output, the tensors futures."""
        self._calls.append(call)
        for index, tensor in enumerate(call.form.tensors):
            resolve = self._resolver(call, index)
            call.futures.append(
                FutureTensor.of(tensor.shape, tensor.dtype, tensor.device, resolve, strides=tensor.strides)
            )
        output = call.form.fill(call.futures)
        if len(self._calls) == self.group.size:
            self.close()
        return output

    def close(self) -> None:
        """Exchanges the results of the open round, if there is one. All ranks must do so together."""
        calls, self._calls = self._calls, []
        away = {rank: call for rank, call in enumerate(calls) if not call.is_exchanged}
        if away and self.group.rank not in away:
            again = next(iter(away.values())).again
            if again is not None:
                again()
        if len(away) == self.group.size and len({call.form.tensors for call in calls}) == 1:
            self._gather(calls)
        else:
            self._broadcast(away)
        for call in calls:
            call.is_exchanged = True
        for future in [future for call in calls for future in call.futures]:
            future.value()

    def drop(self) -> None:
        """Forgets the open round: its results will never be there. For when the program has failed."""
        self._calls = []

    @contextmanager
    def run(self) -> Iterator[None]:
        """A context around a program that all ranks run, from its first call to its last.

        At its end the open round is closed, so that no result is left to be asked for by one rank alone; after an
        exception it is dropped. Inside of another it does the same.
        """
        was_running, self.is_running = self.is_running, True
        try:
            yield
            self.close()
        finally:
            self.drop()
            self.is_running = was_running

    def _resolver(self, call: Turn, index: int) -> Callable[[], Tensor]:
        def resolve() -> Tensor:
            if call in self._calls:
                self.close()
            if not call.is_exchanged:
                raise GenerationError(
                    f"The result of a denoiser call, shape {call.form.tensors[index].shape}, is lost: "
                    "a call of the same round failed, or the run was ended. Run the pipeline again."
                )
            return call.tensors[index]

        return resolve

    def _gather(self, calls: list[Turn]) -> None:
        """All ranks have a call, and all outputs have one form: one collective for each tensor."""
        own = calls[self.group.rank].tensors
        for index, tensor in enumerate(own):
            parts = self.group.all_gather(_flat(tensor))
            for rank, part in enumerate(parts):
                if rank != self.group.rank:
                    calls[rank].tensors.append(_shaped(part, calls[rank].form.tensors[index]))

    def _broadcast(self, calls: dict[int, Turn]) -> None:
        """Calls of some ranks, or of different forms: one collective for each tensor of each."""
        for rank, call in calls.items():
            if rank != self.group.rank:
                call.tensors = [form.empty() for form in call.form.tensors]
            for tensor in call.tensors:
                self.group.broadcast(_flat(tensor), rank)


_ROUNDS: WeakValueDictionary[Group, Rounds] = WeakValueDictionary()


def rounds_of(group: Group) -> Rounds:
    """The rounds of a group: the same object as long as somebody holds it."""
    rounds = _ROUNDS.get(group)
    if rounds is None:
        rounds = _ROUNDS[group] = Rounds(group)
    return rounds


def _flat(tensor: Tensor) -> Tensor:
    """A tensor that fills its memory, in the order of its memory; contiguous."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _shaped(flat: Tensor, form: TensorForm) -> Tensor:
    """The reverse of `_flat`."""
    return flat.as_strided(form.shape, form.strides)


def _words(form: OutputForm | None) -> str:
    """Shapes and dtypes, for messages."""
    if form is None:
        return "something that is no tensor"
    return ", ".join(f"{tensor.shape} {tensor.dtype}" for tensor in form.tensors)

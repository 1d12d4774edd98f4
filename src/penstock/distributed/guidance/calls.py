"""Guidance over several ranks: a denoiser's predictions with and without the prompt, at the same time.

Owns how a denoiser's calls are intercepted, and which of two ways each takes: a batch is cut (`batches`), single
calls go by turns (`rounds`). Does not know the pipeline, nor which prediction is the guided one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from penstock.distributed.group import Group
from penstock.distributed.guidance.batches import Batch, UnsplittableError, batch_of, mixes_samples
from penstock.distributed.guidance.futures import wait
from penstock.distributed.guidance.rounds import OutputForm, Rounds, rounds_of
from penstock.interception import intercept
from penstock.undo import Undo

_CONDITIONS = re.compile(r"encoder|caption|cap_feats|pooled|txt|text|prompt|clip|mask|_ids$|rope|rotary")
"""Arguments whose sizes the prediction's shape does not depend on."""
_MOMENTS = re.compile(r"^t$|timestep|sigma|scale")
"""Arguments whose numbers it does not depend on."""


Require = Callable[[Literal["turns", "batch"]], None]
"""Refuses a call that is about to go one of the two ways, on all ranks alike."""


def apply_guidance(
    denoiser: nn.Module, group: Group, *, lockstep: bool = False, require: Require = lambda way: None
) -> Undo:
    """Shares out the calls of a denoiser among the ranks of a group. All ranks run the same pipeline.

    A call whose batch the group divides (the two halves of classifier-free guidance, several pictures) is cut, and
    the parts of the output gathered: within rounding of one rank's. Single calls (pipelines that call once per
    prediction) go by turns, and the pipeline gets futures meanwhile: exactly what one rank computes. Without
    guidance there is nothing to share: one rank computes, and the others receive.

    Only calls of the module are intercepted, so its hooks run only where a call is executed. Everything else about
    it, its class included, stays. What a call changes besides its output, such as a cache or the random state,
    is changed only on the rank that executes it; the same prediction of every step goes to the same rank.

    All of this only inside of `rounds_of(group).run()`, which surrounds what all ranks do alike. Outside, where nobody
    would see to it that the last results are exchanged, each rank makes its calls itself, and exchanges nothing.

    Args:
        denoiser: A transformer or U-Net of a pipeline; several of one pipeline share their rounds.
        group: The ranks, each with the whole denoiser, or with the same part of it.
        lockstep: Every rank executes as many calls, some of them for nothing: for weights that are sharded over
            these ranks, whose gathering takes all of them.
        require: Refuses what does not go with the way that a call takes, before it is made.

    Returns:
        What takes it back.

    Cost: received per rank and round (size - 1) predictions, or that share of the batch's. The first single call
    with samples of a new shape is executed by every rank, to learn what it returns.
    """
    if group.size == 1:
        return Undo()
    return intercept(denoiser, "__call__", _Calls(denoiser, group, lockstep, require).make)


class _Calls:
    """The calls of one denoiser."""

    def __init__(self, denoiser: nn.Module, group: Group, lockstep: bool, require: Require) -> None:
        self._denoiser, self._group, self._lockstep = denoiser, group, lockstep
        self._require = require
        self._rounds: Rounds = rounds_of(group)
        self._names = list(inspect.signature(type(denoiser).forward).parameters)[1:] or [""]
        self._forms: dict[Hashable, OutputForm | None] = {}

    def make(self, execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a call, in the way that suits its arguments."""
        if not self._rounds.is_running:
            return execute(*args, **kwargs)
        args, kwargs = wait((args, kwargs))
        arguments = named(self._names, args, kwargs)
        batch = batch_of(arguments[0][1], self._group)
        share = self._share(batch, args, kwargs) if batch is not None else None
        self._require("turns" if share is None else "batch")
        if batch is not None and share is not None:
            self._rounds.close()
            return batch.join(execute(*share[0], **share[1]), self._group)
        kind = kind_of(arguments)
        form = self._forms.get(kind)
        call = partial(execute, *args, **kwargs)
        together = self._denoiser if self._lockstep else None
        if form is not None:
            return self._rounds.add(call, form, together)
        output, self._forms[kind] = self._rounds.learn(call, together)
        return output

    def _share(
        self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]] | None:
        """This rank's part of the arguments; None if they do not all say whether they belong to the batch."""
        if mixes_samples(self._denoiser):
            return None
        try:
            return (
                [batch.cut(name, value) for name, value in _positional(self._names, args)],
                {name: batch.cut(name, value) for name, value in kwargs.items()},
            )
        except UnsplittableError:
            return None


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call with their names, the sample first.

    Args:
        names: of the parameters; at least one, that of the sample.
        args: of the call.
        kwargs: of the call.
    """
    by_name = sorted(kwargs.items(), key=lambda item: item[0] != names[0])
    return [*_positional(names, args), *by_name] or [("", None)]


def _positional(names: list[str], args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return list(zip([*names, *[""] * len(args)], args, strict=False))


def kind_of(arguments: list[tuple[str, Any]]) -> Hashable:
    """What two calls have in common that return outputs of one form; the sample is the first argument."""
    (first, sample), *rest = arguments
    traits = [(name, *(_trait(name, leaf) for leaf in tree_leaves(value))) for name, value in rest]
    return (first, *(_trait("", leaf) for leaf in tree_leaves(sample))), *sorted(traits, key=lambda trait: trait[0])


def _trait(name: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype if _CONDITIONS.search(name) else (leaf.dtype, leaf.shape)
    if isinstance(leaf, (bool, str)) or (isinstance(leaf, int) and not _MOMENTS.search(name)):
        return leaf
    return type(leaf)

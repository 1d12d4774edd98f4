"""Gradients and weights that leave: `backward` is refused where it would compute with the weights of another unit.

torch's own check sees that the memory of a saved weight has changed. It is passed by where somebody else saves tensors:
gradient checkpointing, `save_on_cpu`, any `saved_tensors_hooks`. So each output of a module is hooked, where gradients
are recorded: its gradient may go on only if the module's weights have stayed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch.utils._pytree import tree_leaves

from penstock.errors import UsageError


class Stay(Protocol):
    """A unit that comes and goes."""

    @property
    def name(self) -> str:
        """The unit's name."""
        ...

    @property
    def num_left(self) -> int:
        """How often it has left the device."""
        ...


def watch_backward(units: Sequence[Stay], args: Any, output: Any) -> None:
    """Have `backward` refuse to go through a module whose weights have left since.

    Args:
        units: that hold its weights; they are on the device now.
        args: that it was called with.
        output: what it has returned.

    Cost: nothing where no gradients are recorded; else a hook on each tensor of the output.
    """
    if not torch.is_grad_enabled():
        return
    given = {id(leaf) for leaf in tree_leaves(args)}
    check = partial(_require_stay, [(unit, unit.num_left) for unit in units])
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None and id(leaf) not in given:
            leaf.register_hook(check)  # type: ignore[no-untyped-call]


def is_in_backward() -> bool:
    """Whether this thread runs a `backward`, as it does when a checkpoint computes a forward again."""
    return torch._C._current_graph_task_id() != -1


def refuse_backward(name: str) -> NoReturn:
    """Say that `backward` needs a unit that is not there.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"backward needs the weights of {name}, which have left the device since the forward: gradients would be "
        "wrong, with gradient checkpointing and without. Weights must stay for gradients: give a max_weight_memory "
        "that holds all of them, or call remove() on what penstock.apply returned (offload='none')."
    )


def _require_stay(stays: Sequence[tuple[Stay, int]], gradient: torch.Tensor) -> None:
    """The hook of an output."""
    for unit, num_left in stays:
        if unit.num_left != num_left:
            refuse_backward(unit.name)

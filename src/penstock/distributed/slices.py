"""One rank's slice of a weight: cut, and put together again from all ranks.

Owns the arithmetic of slices and the life of a Parameter that is one. Does not know layers or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.errors import ModelError
from penstock.undo import Undo

IsMapped = Callable[[Tensor], bool]
"""Whether a weight lies in a mapped file, where holding on to it costs no memory."""


def cut(tensor: Tensor, dim: int, parts: Sequence[int], rank: int, size: int) -> Tensor:
    """One rank's slice: its share of each part, side by side.

    Args:
        tensor: that is `sum(parts)` wide along `dim`.
        dim: along which it is cut.
        parts: widths that `size` divides.
        rank: whose slice.
        size: number of ranks.

    Returns:
        A view where the slice is one contiguous run, else a copy.
    """
    begins = accumulate(parts, initial=0)
    shares = [
        tensor.narrow(dim, begin + rank * (width // size), width // size)
        for begin, width in zip(begins, parts, strict=False)
    ]
    return shares[0].contiguous() if len(shares) == 1 else torch.cat(shares, dim)


def join(slices: Sequence[Tensor], dim: int, parts: Sequence[int]) -> Tensor:
    """What was cut into these slices, in rank order."""
    shares = [torch.split(piece, [width // len(slices) for width in parts], dim) for piece in slices]
    return torch.cat([share for part in zip(*shares, strict=True) for share in part], dim)


@dataclass(frozen=True)
class Slicing:
    """How the ranks of a group share a weight.

    Attributes:
        dim: along which it is cut.
        parts: widths along the dim, each of which is cut for all ranks.
        group: of ranks.
    """

    dim: int
    parts: tuple[int, ...]
    group: Group

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's slice, as `cut` gives it."""
        return cut(whole, self.dim, self.parts, self.group.rank, self.group.size)

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor is as wide as all slices."""
        return tensor.shape[self.dim] == sum(self.parts)

    def gather(self, part: Tensor) -> Tensor:
        """The whole, from the slices of all ranks; on the meta device nothing is sent."""
        slices = [part] * self.group.size if part.is_meta else self.group.all_gather(part)
        return join(slices, self.dim, self.parts)


@dataclass
class Surgery:
    """A model that is being cut.

    Attributes:
        group: the ranks that share it.
        undo: to which each change adds its way back, before it is made.
        is_mapped: gives the same answer on all ranks.
        is_over: nothing went wrong, so that all ranks come to the undo together.
    """

    group: Group
    undo: Undo
    is_mapped: IsMapped = lambda weight: False
    is_over: bool = False


def keep_slice(module: nn.Module, name: str, slicing: Slicing, surgery: Surgery) -> None:
    """Leave this rank's slice in a Parameter, which stays the same object; the undo makes it whole.

    A weight of a mapped file is kept for the undo, and its slice is a view of it where it is one contiguous run. Any
    other is let go: its slice is a copy, and the undo gathers it from all ranks. Where the surgery is not over the
    others may not be there: nothing is sent, and the module says that it is a part when it is run.

    Args:
        module: whose Parameter it is.
        name: of the Parameter in it.
        slicing: how it is cut.
        surgery: of which this is a part.

    Cost: bytes of one slice where it is a copy; the undo receives (size - 1) of them where nothing was kept.
    """
    weight = module._parameters[name]
    assert weight is not None
    whole, part = weight.data, slicing.cut(weight.data)
    if surgery.is_mapped(whole) and not whole.is_meta:  # those without memory may get some later
        surgery.undo.add(lambda: _put_back(module, name, weight, whole))
    else:
        is_view = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        part = part.clone() if is_view else part
        surgery.undo.add(lambda: _gather(module, name, slicing, surgery))
    weight.data = part


def _put_back(module: nn.Module, name: str, weight: nn.Parameter, whole: Tensor) -> None:
    now = module._parameters[name]
    weight.data = whole if now is None else whole.to(now.device, now.dtype)
    module._parameters[name] = weight


def _gather(module: nn.Module, name: str, slicing: Slicing, surgery: Surgery) -> None:
    weight = module._parameters[name]
    if weight is None or slicing.is_whole(weight):  # interrupted before it was cut, or after it was gathered
        return
    if surgery.is_over or weight.is_meta:
        weight.data = slicing.gather(weight.data)
    else:
        vars(module)["forward"] = partial(_refuse, type(module).__name__, name, slicing)


def _refuse(kind: str, name: str, slicing: Slicing, *_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        f"a {kind} has 1/{slicing.group.size} of its {name}: cutting the model for {slicing.group.size} ranks failed "
        "half-way, and what was let go by then is on no single rank. Load the pipeline again."
    )

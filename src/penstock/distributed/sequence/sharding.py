"""Pieces of a tensor on the ranks that share its sequence, and the whole again.

Owns the calls that a model's own code makes; they act on the sequence group of the mesh in use. Every rank gets a piece
of the same size. Does not know attention, or which tensors belong to one sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock.distributed.parallel_state import get_sp_group


def sp_shard(tensor: Tensor, dim: int, validate: bool = True) -> Tensor:
    """This rank's piece of a tensor that is the same on all ranks.

    Args:
        tensor: of any dtype and layout.
        dim: along which it is split.
        validate: refuse a length that does not divide. Otherwise the last pieces are filled up with the last token, so
            that every rank has `ceil(length / ranks)` of them.

    Returns:
        A contiguous piece; the tensor itself on one rank.

    Raises:
        ValueError: for a length that does not divide, if `validate`.
        RuntimeError: where no mesh is in use.
    """
    ranks, length = get_sp_group().size, tensor.shape[dim]
    if length % ranks and validate:
        raise ValueError(
            f"{length} tokens (dim {dim} of {tuple(tensor.shape)}) do not divide over {ranks} ranks: pieces would "
            f"differ in size. Try sp_shard_with_padding, or {length - length % ranks} or {-(-length // ranks) * ranks} "
            "tokens."
        )
    piece, _ = _piece(tensor, dim, None)
    return piece


def sp_shard_with_padding(tensor: Tensor, dim: int, pad_value: float = 0.0) -> tuple[Tensor, int]:
    """This rank's piece of a tensor that is padded at its end to a multiple of the number of ranks.

    Args:
        tensor: of any dtype and layout, the same on all ranks.
        dim: along which it is split.
        pad_value: what the padding consists of.

    Returns:
        A contiguous piece, and how many tokens of padding there are on all ranks together. `sp_gather` followed by
        `narrow(dim, 0, length)` gives the tensor back.

    Raises:
        RuntimeError: where no mesh is in use.
    """
    return _piece(tensor, dim, pad_value)


def sp_gather(tensor: Tensor, dim: int, validate: bool = True) -> Tensor:
    """The pieces of all ranks, one after another in rank order.

    Args:
        tensor: this rank's piece; of one shape and dtype on all ranks.
        dim: along which they are joined.
        validate: compare shapes and dtypes first: unequal pieces would otherwise hang, or give wrong numbers.

    Raises:
        ValueError: for pieces that differ, on every rank, if `validate`.
        RuntimeError: where no mesh is in use.

    Cost: one all-gather; with `validate` a second one of a few bytes, which waits for the device.
    """
    group = get_sp_group()
    if group.size == 1:
        return tensor
    if validate:
        told = f"{tuple(tensor.shape)} {tensor.dtype}".encode().ljust(128)[:128]
        sent = torch.tensor(list(told), dtype=torch.uint8, device=tensor.device)
        seen = [bytes(one.tolist()).decode().strip() for one in group.all_gather(sent)]
        if len(set(seen)) > 1:
            listed = "; ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(seen))
            raise ValueError(f"{len(set(seen))} kinds of pieces ({listed}): a gather takes equal ones. Use sp_shard.")
    return torch.cat(group.all_gather(tensor), dim)


def _piece(tensor: Tensor, dim: int, pad_value: float | None) -> tuple[Tensor, int]:
    """This rank's piece, padded with a value or, for None, with the last token; and the padding on all ranks."""
    group, length = get_sp_group(), tensor.shape[dim]
    size = -(-length // group.size)
    padding = size * group.size - length
    if group.size == 1:
        return tensor, 0
    start = min(group.rank * size, length)
    own = tensor.narrow(dim, start, min(size, length - start))
    missing = size - own.shape[dim]
    if missing:
        last = tensor.narrow(dim, length - 1, 1)
        shape = list(last.shape)
        shape[dim] = missing
        pads = last.expand(shape) if pad_value is None else last.new_full(shape, pad_value)
        own = torch.cat([own, pads], dim)
    return own.contiguous(), padding


class ShardingValidator:
    """Finds tensors that were split and never gathered.

    with validator.track():
        x = validator.shard(x, "hidden_states", dim=1)
        x = validator.gather(block(x), "hidden_states", dim=1)
    validator.validate()
    """

    def __init__(self) -> None:
        self._is_tracking = False
        self._sharded: set[str] = set()
        self._gathered: set[str] = set()

    def reset(self) -> None:
        """Forget what was split and gathered."""
        self._sharded.clear()
        self._gathered.clear()

    @contextmanager
    def track(self) -> Iterator[ShardingValidator]:
        """Note what is split and gathered from here on, having forgotten the rest; kept for `validate` afterwards."""
        self.reset()
        self._is_tracking = True
        try:
            yield self
        finally:
            self._is_tracking = False

    def shard(self, tensor: Tensor, name: str, dim: int, validate_divisible: bool = True) -> Tensor:
        """`sp_shard`, noted under a name; warns where the name is split already.

        Raises:
            ValueError: for a length that does not divide, if `validate_divisible`.
        """
        piece = sp_shard(tensor, dim, validate=validate_divisible)
        if self._is_tracking:
            if name in self._sharded - self._gathered:
                warnings.warn(f"{name!r} is split twice without a gather between.", UserWarning, stacklevel=2)
            self._sharded.add(name)
            self._gathered.discard(name)
        return piece

    def gather(self, tensor: Tensor, name: str, dim: int) -> Tensor:
        """`sp_gather`, noted under a name; warns where the name was never split."""
        if self._is_tracking:
            if name not in self._sharded:
                warnings.warn(f"{name!r} is gathered, and was never split.", UserWarning, stacklevel=2)
            self._gathered.add(name)
        return sp_gather(tensor, dim)

    def validate(self) -> None:
        """Check that all that was split was gathered.

        Raises:
            ValueError: naming what was not.
        """
        left = sorted(self._sharded - self._gathered)
        if left:
            raise ValueError(
                f"{len(left)} of {len(self._sharded)} split tensors were never gathered: {', '.join(left)}. Each rank "
                "holds only its own piece of them. Call gather with the same name."
            )


_VALIDATOR = ShardingValidator()


def get_sharding_validator() -> ShardingValidator:
    """The process's own validator."""
    return _VALIDATOR

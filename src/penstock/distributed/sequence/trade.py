"""Ulysses: ranks trade tokens for heads before attention, and back after it.

Before, a rank holds its pieces of the streams with all heads; after, it holds a share of the heads of all tokens of
its ring rank. One all-to-all there for queries, keys and values together, one back.

Owns the packing. Source: DeepSpeed-Ulysses, arXiv 2309.14509. Does not know masks or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.distributed.sequence.streams import Streams

Names = Sequence[str]
Pieces = tuple[Tensor, ...]
"""A stream in parts that lie one after another: not yet copied into one."""


def even_heads(query: Tensor, key: Tensor, value: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries and keys a number of heads that can be dealt out: grouped ones are repeated, missing ones are zero.

    Args:
        query: (batch, tokens, heads, head_dim).
        key: the same with perhaps fewer heads, each for a run of query heads.
        value: as `key`.
        size: ranks to deal out to.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads != kv_heads and (heads % size or kv_heads % size):
        key, value = (tensor.repeat_interleave(heads // kv_heads, 2) for tensor in (key, value))
    return _fill_heads(query, size), _fill_heads(key, size), _fill_heads(value, size)


def to_heads(streams: Streams, tensors: Sequence[tuple[Tensor, Names]]) -> list[list[Pieces]]:
    """Trade tokens for heads.

    Args:
        streams: of this forward.
        tensors: each (batch, local tokens, heads, head_dim), with the streams that lie in it one after another; all of
            one dtype, heads as `even_heads` makes them.

    Returns:
        For each tensor its streams, each in pieces of (batch, tokens, heads / ulysses, head_dim), one after another:
        all tokens of this ring rank, pads at the end of a stream included.

    Cost: one all-to-all and one copy; none where all streams are whole or one rank trades.
    """
    size, rank = streams.ulysses.size, streams.ulysses.rank
    split = [torch.split(tensor, [streams.local(name) for name in names], 1) for tensor, names in tensors]
    sent = [
        _spread_heads(part, size)
        for parts, (_, names) in zip(split, tensors, strict=True)
        for part, name in zip(parts, names, strict=True)
        if not streams.is_whole(name)
    ]
    received = iter(_trade(streams, sent))
    return [
        [
            _own_heads(part, size, rank) if streams.is_whole(name) else tuple(next(received))
            for part, name in zip(parts, names, strict=True)
        ]
        for parts, (_, names) in zip(split, tensors, strict=True)
    ]


def to_tokens(streams: Streams, parts: Sequence[Tensor], names: Names, num_heads: int) -> Tensor:
    """Trade heads for tokens: the way back.

    Args:
        streams: of this forward.
        parts: per stream, (batch, tokens, heads / ulysses, head_dim), pads left out.
        names: of the streams.
        num_heads: how many there were before `even_heads`.

    Returns:
        (batch, local tokens, num_heads, head_dim); pads are zero.

    Cost: one all-to-all for streams that are cut, one all-gather per stream that is whole.
    """
    size = streams.ulysses.size
    cut = [(part, streams.piece(name)) for part, name in zip(parts, names, strict=True) if not streams.is_whole(name)]
    found: Iterator[Tensor] = iter(())
    if cut:
        blocks = [_by_rank(part, size, width) for part, width in cut]
        block = streams.ulysses.all_to_all(torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0])
        tokens = block.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (batch, tokens, heads, head_dim)
        if len(cut) == len(names):
            return tokens[:, :, :num_heads]
        found = iter(torch.split(tokens, [width for _, width in cut], 1))
    whole = [
        torch.cat(streams.ulysses.all_gather(part), 2) if streams.is_whole(name) else next(found)
        for part, name in zip(parts, names, strict=True)
    ]
    return torch.cat(whole, 1)[:, :, :num_heads]


def _fill_heads(tensor: Tensor, size: int) -> Tensor:
    missing = -tensor.shape[2] % size
    return F.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def _spread_heads(tensor: Tensor, size: int) -> Tensor:
    """(batch, tokens, heads, head_dim) to (ulysses, batch, tokens, heads / ulysses, head_dim), a view."""
    return torch.unflatten(tensor, 2, (size, -1)).permute(2, 0, 1, 3, 4)


def _own_heads(tensor: Tensor, size: int, rank: int) -> Pieces:
    share = tensor.shape[2] // size
    return (tensor[:, :, rank * share : (rank + 1) * share],)


def _by_rank(tensor: Tensor, size: int, width: int) -> Tensor:
    """(batch, tokens, share, head_dim), filled up with zeros, to (ulysses, batch, width, share, head_dim)."""
    missing = size * width - tensor.shape[1]
    padded = F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
    return torch.unflatten(padded, 1, (size, width)).transpose(0, 1)


def _trade(streams: Streams, tensors: Sequence[Tensor]) -> list[Tensor]:
    """All-to-all of several tensors (ulysses, ...) as one, each copied once into what is sent."""
    group = streams.ulysses
    if group.size == 1 or not tensors:
        return list(tensors)
    widths = [tensor.numel() // group.size for tensor in tensors]
    packed = tensors[0].new_empty((group.size, sum(widths)))
    for tensor, place in zip(tensors, torch.split(packed, widths, 1), strict=True):
        place.view(tensor.shape).copy_(tensor)
    traded = torch.split(group.all_to_all(packed), widths, 1)
    return [part.view(tensor.shape) for part, tensor in zip(traded, tensors, strict=True)]

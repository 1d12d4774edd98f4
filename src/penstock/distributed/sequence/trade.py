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


def to_heads(streams: Streams, tensors: Sequence[tuple[Tensor, Names]]) -> list[list[Tensor]]:
    """Trade tokens for heads.

    Args:
        streams: of this forward.
        tensors: each (batch, local tokens, heads, head_dim), with the streams that lie in it one after another; all of
            one dtype, heads as `even_heads` makes them.

    Returns:
        For each tensor its streams, each (batch, tokens, heads / ulysses, head_dim): all tokens of this ring rank,
        pads at the end of a stream included.

    Cost: one all-to-all; none where all streams are whole or one rank trades.
    """
    size, rank = streams.ulysses.size, streams.ulysses.rank
    split = [_by_stream(streams, tensor, names) for tensor, names in tensors]
    sent = [_cut_parts(streams, parts, names) for parts, (_, names) in zip(split, tensors, strict=True)]
    packed = [_spread_heads(torch.cat(parts, 1), size) for parts in sent if parts]
    received = iter(_trade(streams, packed))
    results = []
    for parts, (tensor, names) in zip(split, tensors, strict=True):
        share = tensor.shape[2] // size
        found: Iterator[Tensor] = iter(())
        if any(not streams.is_whole(name) for name in names):
            block = next(received).transpose(0, 1)  # (batch, ulysses, tokens, share, head_dim)
            widths = [streams.piece(name) for name in names if not streams.is_whole(name)]
            found = iter([part.flatten(1, 2) for part in torch.split(block, widths, 2)])
        results.append(
            [
                part[:, :, rank * share : (rank + 1) * share] if streams.is_whole(name) else next(found)
                for name, part in zip(names, parts, strict=True)
            ]
        )
    return results


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
    blocks, widths = [], []
    for part, name in zip(parts, names, strict=True):
        if streams.is_whole(name):
            continue
        width = streams.piece(name)
        missing = size * width - part.shape[1]
        padded = F.pad(part, (0, 0, 0, 0, 0, missing)) if missing else part
        blocks.append(
            torch.unflatten(padded, 1, (size, width)).transpose(0, 1)
        )  # (ulysses, batch, tokens, share, head_dim)
        widths.append(width)
    found: Iterator[Tensor] = iter(())
    if blocks:
        (block,) = _trade(streams, [torch.cat(blocks, 2).contiguous()])
        tokens = block.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (batch, tokens, heads, head_dim)
        found = iter(torch.split(tokens, widths, 1))
    whole = [
        torch.cat(streams.ulysses.all_gather(part), 2) if streams.is_whole(name) else next(found)
        for part, name in zip(parts, names, strict=True)
    ]
    return torch.cat(whole, 1)[:, :, :num_heads]


def _fill_heads(tensor: Tensor, size: int) -> Tensor:
    missing = -tensor.shape[2] % size
    return F.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def _by_stream(streams: Streams, tensor: Tensor, names: Names) -> tuple[Tensor, ...]:
    return torch.split(tensor, [streams.local(name) for name in names], 1)


def _cut_parts(streams: Streams, parts: Sequence[Tensor], names: Names) -> list[Tensor]:
    return [part for part, name in zip(parts, names, strict=True) if not streams.is_whole(name)]


def _spread_heads(tensor: Tensor, size: int) -> Tensor:
    """(batch, tokens, heads, head_dim) to (ulysses, batch, tokens, heads / ulysses, head_dim)."""
    return torch.unflatten(tensor, 2, (size, -1)).permute(2, 0, 1, 3, 4)


def _trade(streams: Streams, tensors: Sequence[Tensor]) -> list[Tensor]:
    """All-to-all of several tensors (ulysses, ...) as one."""
    group = streams.ulysses
    if group.size == 1 or not tensors:
        return list(tensors)
    flat = [tensor.reshape(group.size, -1) for tensor in tensors]
    traded = group.all_to_all(torch.cat(flat, 1) if len(flat) > 1 else flat[0])
    widths = [part.shape[1] for part in flat]
    parts = torch.split(traded, widths, 1)
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

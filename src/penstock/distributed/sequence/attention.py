"""Attention over streams that are cut over ranks: Ulysses, Ring, or both.

    tokens -> heads (all-to-all) -> attention over all keys, or part by part around the ring -> tokens (all-to-all)

Owns the order of exchange and compute. Does not know who calls it, or which kernel the user chose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.distributed.sequence.kernels import Part, attend_part, merge
from penstock.distributed.sequence.masks import mask_part, share_of_heads, whole_mask
from penstock.distributed.sequence.streams import Streams
from penstock.distributed.sequence.trade import Names, Pieces, even_heads, to_heads, to_tokens
from penstock.errors import GenerationError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention on one rank: query, key, value (batch, tokens, heads, head_dim) and mask, to an output like the query."""


@dataclass(frozen=True)
class Sight:
    """What an attention sees: the streams of its queries and of its keys, one after another.

    Attributes:
        streams: of the denoiser.
        queries: names of streams.
        keys: names of streams.
        masks: how to read a mask of local queries and keys: that of the row.
    """

    streams: Streams
    queries: Names
    keys: Names
    masks: str = ""


@dataclass(frozen=True)
class Call:
    """One call of attention, as the denoiser made it.

    Attributes:
        query: (batch, local tokens, heads, head_dim).
        key: (batch, local keys, heads, head_dim); heads may be grouped.
        value: as `key`.
        mask: of local or of whole keys; None where all take part.
        scale: of the scores; None for 1 / sqrt(head_dim).
        is_causal: whether a query sees no later keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False


def attend(sight: Sight, call: Call, kernel: Kernel) -> Tensor:
    """Attention over all tokens of the streams, for this rank's.

    Args:
        sight: what the attention sees.
        call: what it was given.
        kernel: the user's own, used where no ring is.

    Returns:
        (batch, local tokens, heads, head_dim).

    Raises:
        GenerationError: for tokens that are not those of the streams, for a mask that cannot be split, and for causal
            attention around a ring.

    Cost: per call 4 (U - 1) / U of the local tokens' bytes in two all-to-all, and the ring's keys and values R - 1
        times, while the part before is computed.
    """
    sight = _sized(sight, call)
    streams = sight.streams
    mask = None
    if call.mask is not None:
        mask = whole_mask(streams, call.mask, sight.queries, sight.keys, sight.masks)
        mask = share_of_heads(streams, mask)
    query, key, value = even_heads(call.query, call.key, call.value, streams.ulysses.size)
    queries, keys, values = to_heads(streams, ((query, sight.queries), (key, sight.keys), (value, sight.keys)))
    held = [streams.run(name, streams.ring.rank)[1] for name in sight.queries]
    query = _lined_up(queries, held)
    if streams.ring.size == 1:
        whole = [streams.lengths[name] for name in sight.keys]
        output = kernel(query, _lined_up(keys, whole), _lined_up(values, whole), mask)
    else:
        if call.is_causal:
            raise GenerationError(
                f"causal attention cannot go around a ring of {streams.ring.size}: later parts would wait for earlier "
                "ones. Use ulysses_degree in place of ring_degree."
            )
        output = _around_ring(sight, query, (keys, values), mask, call.scale)
    return to_tokens(streams, torch.split(output, held, 1), sight.queries, call.query.shape[2])


def _sized(sight: Sight, call: Call) -> Sight:
    """The sight with the lengths that its streams have in this call.

    Adapters attend to tokens of their own within the modules that a row names.
    """
    streams, lengths = sight.streams, dict(sight.streams.lengths)
    if sight.masks == "absent":
        for name in filter(streams.is_whole, sight.queries):
            lengths[name] -= sum(map(streams.local, sight.queries)) - call.query.shape[1]
        streams = copy.copy(streams)
        streams.lengths = lengths
    for what, tensor, names in (("queries", call.query, sight.queries), ("keys", call.key, sight.keys)):
        expected = sum(map(streams.local, names))
        if tensor.shape[1] != expected:
            raise GenerationError(
                f"an attention of {streams.owner} has {tensor.shape[1]} {what}, where {'+'.join(names)} are "
                f"{expected} on this rank: it looks at tokens that the row of this class does not name, as adapters "
                "and caches do. Leave them out, or use ulysses_degree=1 and ring_degree=1."
            )
    return replace(sight, streams=streams)


def _around_ring(
    sight: Sight, query: Tensor, held: tuple[list[Pieces], list[Pieces]], mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention part by part: while one is computed, the next ring rank's keys and values are on their way."""
    streams = sight.streams
    ring = streams.ring
    moving = [item for item, name in enumerate(sight.keys) if not streams.is_whole(name)]
    widths = [sum(piece.shape[1] for piece in held[0][item]) for item in moving]
    packed = None
    if moving:
        packed = torch.stack([torch.cat([piece for item in moving for piece in part[item]], 1) for part in held])
    total: Part | None = None
    for turn in range(ring.size):
        source = (ring.rank - turn) % ring.size
        is_last = turn == ring.size - 1
        under_way = ring.shift(packed) if packed is not None and not is_last else None
        keys, values = (_replaced(part, moving, packed, i, widths) for i, part in enumerate(held))
        counts = [streams.run(name, source)[1] for name in sight.keys]
        if sum(counts):
            part_mask = None if mask is None else mask_part(streams, mask, sight.queries, sight.keys, source)
            part = attend_part(query, _lined_up(keys, counts), _lined_up(values, counts), part_mask, scale)
            total = part if total is None else merge(total, part)
        if under_way is not None:
            packed, works = under_way
            for work in works:
                work.wait()
    assert total is not None  # every stream has a token somewhere
    return total[0].to(query.dtype)


def _replaced(
    parts: Sequence[Pieces], moving: Sequence[int], packed: Tensor | None, item: int, widths: Sequence[int]
) -> list[Pieces]:
    """The streams of keys (item 0) or values (item 1), those that move replaced by what has come around."""
    streams = list(parts)
    if packed is not None:
        for position, part in zip(moving, torch.split(packed[item], list(widths), 1), strict=True):
            streams[position] = (part,)
    return streams


def _lined_up(streams: Sequence[Pieces], counts: Sequence[int]) -> Tensor:
    """Streams one after another, the first tokens of each: without their pads."""
    parts = [part for pieces, count in zip(streams, counts, strict=True) for part in _first(pieces, count)]
    if not parts:
        return streams[0][0][:, :0]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _first(pieces: Pieces, count: int) -> Iterator[Tensor]:
    for piece in pieces:
        if count > 0:
            yield piece[:, :count]
        count -= piece.shape[1]

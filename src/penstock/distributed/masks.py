"""Attention masks of streams that are cut: which keys take part, whole and in the plain order.

A mask comes along with the local tokens, and then only says which keys take part; or it was made before anything was
cut, and then may say so for every query. Owns telling these apart. Does not know kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.distributed.streams import Streams
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout


def whole_mask(streams: Streams, mask: Tensor, queries: Sequence[str], keys: Sequence[str]) -> Tensor:
    """The mask over all tokens of the streams.

    Args:
        streams: of this forward.
        mask: (batch, keys), (batch, queries, keys) or (batch, 1, queries, keys); of bits, or added to the scores. A
            mask over local queries and keys counts as one of keys: a key takes part if it does for any local query.
        queries: streams of the queries.
        keys: streams of the keys.

    Returns:
        (batch, 1, queries or 1, keys), whole.

    Raises:
        GenerationError: for a mask that differs between heads, or whose size fits no stream.

    Cost: one all-gather where the mask is local.
    """
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise GenerationError(
            f"an attention mask of shape {tuple(mask.shape)} differs between heads, and heads are split over ranks. "
            "Run this pipeline with ulysses_degree=1 and ring_degree=1."
        )
    total = sum(streams.lengths[name] for name in keys)
    if mask.shape[-1] == total and mask.shape[-2] in (1, sum(streams.lengths[name] for name in queries)):
        return mask
    if mask.shape[-1] == sum(map(streams.local, keys)) and mask.shape[-2] in (1, sum(map(streams.local, queries))):
        local = mask.amax(-2, keepdim=True) if mask.dtype.is_floating_point else mask.bool().any(-2, keepdim=True)
        return streams.join(local, Layout(tuple(keys), -1))
    raise GenerationError(
        f"an attention mask of shape {tuple(mask.shape)} fits neither {total} keys nor the "
        f"{sum(map(streams.local, keys))} of this rank. Run this pipeline with ulysses_degree=1 and ring_degree=1."
    )


def mask_part(streams: Streams, mask: Tensor, queries: Sequence[str], keys: Sequence[str], ring_rank: int) -> Tensor:
    """The part of a whole mask for this ring rank's queries and the keys that `ring_rank` holds."""
    part = _runs(streams, mask, keys, ring_rank, -1)
    if part.shape[-2] == 1:
        return part
    return _runs(streams, part, queries, streams.ring.rank, -2)


def _runs(streams: Streams, mask: Tensor, names: Sequence[str], ring_rank: int, dim: int) -> Tensor:
    runs, offset = [], 0
    for name in names:
        start, width = streams.run(name, ring_rank)
        runs.append(mask.narrow(dim, offset + start, width))
        offset += streams.lengths[name]
    return torch.cat(runs, dim) if len(runs) > 1 else runs[0]

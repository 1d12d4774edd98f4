"""Attention masks of streams that are cut: which keys take part, whole and in the plain order.

A mask was made before anything was cut, and may say for every query which keys it sees; or a block made it for its
local tokens, and then the row says what it means. Owns telling these apart. Does not know kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.distributed.sequence.streams import Streams
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout


def whole_mask(
    streams: Streams, mask: Tensor, queries: Sequence[str], keys: Sequence[str], reading: str = ""
) -> Tensor:
    """The mask over all tokens of the streams.

    Args:
        streams: of this forward.
        mask: (batch, keys), (batch, queries, keys) or (batch, heads or 1, queries, keys); of bits, or added to scores.
        queries: streams of the queries.
        keys: streams of the keys.
        reading: what a mask over local queries and keys means: the `masks` of a row.

    Returns:
        (batch, heads or 1, queries or 1, keys), whole.

    Raises:
        GenerationError: for a mask that only the local queries have, and for one whose size fits no stream.

    Cost: one all-gather where the mask is local.
    """
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    for dim in (1, 2):  # expanded, so that all heads or queries have the same
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    num_queries, num_keys = (sum(streams.lengths[name] for name in names) for names in (queries, keys))
    if mask.shape[-1] == num_keys and mask.shape[-2] in (1, num_queries):
        return mask
    local_queries, local_keys = (sum(map(streams.local, names)) for names in (queries, keys))
    if mask.shape[-1] != local_keys or mask.shape[-2] not in (1, local_queries):
        raise _refusal(streams, mask, f"fits neither {num_keys} keys nor the {local_keys} of this rank")
    if mask.shape[-2] == 1:
        return streams.join(mask, Layout(tuple(keys), -1))
    if not reading or tuple(queries) != tuple(keys):
        raise _refusal(streams, mask, "says for each query of this rank which keys it sees, and not for all keys")
    tokens = streams.join(mask.diagonal(dim1=-2, dim2=-1)[:, :, None], Layout(tuple(keys), -1))
    return tokens if reading == "keys" else tokens * tokens.transpose(-1, -2)


def share_of_heads(streams: Streams, mask: Tensor) -> Tensor:
    """The part of a mask for the heads that this rank holds once tokens were traded for them."""
    heads, size = mask.shape[1], streams.ulysses.size
    if heads == 1 or size == 1:
        return mask
    share = -(-heads // size)
    first = streams.ulysses.rank * share
    index = torch.arange(first, first + share, device=mask.device).clamp_(max=heads - 1)
    return mask.index_select(1, index)


def _refusal(streams: Streams, mask: Tensor, reason: str) -> GenerationError:
    return GenerationError(
        f"an attention mask of {streams.owner} of shape {tuple(mask.shape)} {reason}. "
        "Run this pipeline with ulysses_degree=1 and ring_degree=1."
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

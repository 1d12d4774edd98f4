"""Attention on one rank, with the log-sum-exp that the parts of a ring are merged by.

Owns the kernels that tell it, and the merge. Source of the merge: Ring Attention, arXiv 2310.01889. Does not know
ranks or streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.errors import ConfigError

_HEAD_MULTIPLE = 8  # of a head's size, that CUDA's kernels take

Part = tuple[Tensor, Tensor]
"""Attention over some keys: output (batch, tokens, heads, head_dim) and log-sum-exp (batch, tokens, heads, 1)."""


def attend_part(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Part:
    """Attention over a part of the keys.

    Args:
        query: (batch, tokens, heads, head_dim).
        key: (batch, keys, heads, head_dim); heads may be grouped.
        value: as `key`.
        mask: (batch or 1, 1, queries or 1, keys), of bits (True takes part) or added to the scores.
        scale: of the scores; 1 / sqrt(head_dim) where left out.

    Returns:
        In float32. Queries that may see none of these keys have a log-sum-exp of minus infinity.

    Raises:
        ConfigError: on a device without such a kernel.
    """
    if not query.shape[1]:  # the last ranks of a ring may hold pads alone
        return query.float(), query.new_zeros((*query.shape[:-1], 1), dtype=torch.float32)
    if query.shape[2] != key.shape[2]:
        key, value = (tensor.repeat_interleave(query.shape[2] // tensor.shape[2], 2) for tensor in (key, value))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    added = None if mask is None else _added(mask, query.dtype)
    if query.device.type == "cpu":
        output, lse = _attend_cpu(query, key, value, added, scale)
    elif query.device.type == "cuda":
        output, lse = _attend_cuda(query, key, value, added, scale)
    else:
        raise ConfigError(
            f"ring attention needs a kernel that tells its log-sum-exp, and {query.device.type} has none. "
            "Use ulysses_degree in place of ring_degree."
        )
    output, lse = output.transpose(1, 2).float(), lse.transpose(1, 2).unsqueeze(-1).float()
    if added is not None:  # kernels tell something finite where no key takes part
        sees = (added > float("-inf")).any(-1).transpose(1, 2).unsqueeze(-1)
        output, lse = torch.where(sees, output, 0.0), torch.where(sees, lse, float("-inf"))
    return output, lse


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both parts."""
    (output, lse), (other_output, other_lse) = one, other
    highest = torch.maximum(lse, other_lse).clamp(min=torch.finfo(lse.dtype).min)
    weight, other_weight = torch.exp(lse - highest), torch.exp(other_lse - highest)
    total = weight + other_weight
    merged = (output * weight + other_output * other_weight) / total.clamp(min=torch.finfo(lse.dtype).tiny)
    return merged, highest + torch.log(total)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _attend_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Part:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.contiguous(), key.contiguous(), value.contiguous(), 0.0, False, attn_mask=mask, scale=scale
    )
    return output, lse if lse.shape[1] == query.shape[1] else lse.transpose(1, 2)


def _attend_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Part:
    head_dim = query.shape[-1]
    missing = -head_dim % _HEAD_MULTIPLE
    if missing:  # zeros change no score, and their outputs are left out
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    output, lse = _kernel_of_cuda(query, key, value, mask, scale)
    return output[..., :head_dim], lse


def _kernel_of_cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Part:
    if mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, False, False, scale=scale
        )
        return output, lse[:, :, : query.shape[2]]
    if mask is not None:
        mask = _aligned(mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, False, scale=scale
    )
    return output, lse[:, :, : query.shape[2]]


def _aligned(mask: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 bytes, as the kernel asks."""
    missing = -mask.shape[-1] % 8
    if not missing:
        return mask
    return torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]

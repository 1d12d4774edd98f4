"""What sums over rows: norms, reductions, products of matrices, attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from penstock.distributed.patch.layout import Layout
from penstock.distributed.patch.strip import Exchange, Strip, call, fitted, operation, strips_in
from penstock.distributed.patch.views import layout_of

_EXACT = (torch.float32, torch.float64)
"""In these, parts of a sum may be added up between ranks without rounding more than one rank does."""


@operation("native_group_norm")
def _group_norm(func: Any, named: dict[str, Any]) -> Any:
    strip, num_groups = named["input"], named["group"]
    layout = layout_of(strip)
    if layout.dim == 1 or not isinstance(strip, Strip):
        return NotImplemented
    local = strip.local
    if layout.dim == 0:
        return _many(strip, call(func, named | {"input": local, "N": local.shape[0]}), (layout, layout, layout))
    batch, channels = local.shape[:2]
    parts = local.reshape(batch, num_groups, -1)
    parts = parts if parts.dtype in _EXACT else parts.float()
    variance, mean = torch.var_mean(parts, -1, correction=0)
    mean, variance = _merged(mean.double(), variance.double(), parts.shape[-1], strip.exchange)
    rate = torch.rsqrt(variance + named["eps"])
    scale = rate.repeat_interleave(channels // num_groups, 1)
    shift = -mean.repeat_interleave(channels // num_groups, 1) * scale
    if named["weight"] is not None:
        scale, shift = scale * named["weight"], shift * named["weight"]
    shift = shift if named["bias"] is None else shift + named["bias"]
    shape = (batch, channels, *[1] * (local.ndim - 2))
    scale, shift = (figure.to(parts.dtype).view(shape) for figure in (scale, shift))
    result = torch.addcmul(shift, local if local.dtype in _EXACT else local.float(), scale).to(local.dtype)
    return strip.like(result), mean.to(local.dtype), rate.to(local.dtype)


def _merged(mean: Tensor, variance: Tensor, count: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Mean and variance over all ranks, from each rank's own and how many values it has."""
    own = torch.stack([mean, variance, torch.full_like(mean, count)])
    means, variances, counts = torch.stack(exchange.group.all_gather(own), 1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean) ** 2) * counts).sum(0) / total


def _many(strip: Strip, results: Any, layouts: Any) -> tuple[Tensor, ...]:
    return tuple(strip.like(result, layout) for result, layout in zip(results, layouts, strict=True))


@operation("native_layer_norm", "_fused_rms_norm")
def _layer_norm(func: Any, named: dict[str, Any]) -> Any:
    strip = named["input"]
    layout = layout_of(strip)
    if layout.dim >= strip.ndim - len(named["normalized_shape"]):
        return NotImplemented
    results = call(func, named | {"input": strip.local})
    return _many(strip, results, [layout] * len(results))


@operation("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
def _batch_norm(func: Any, named: dict[str, Any]) -> Any:
    strip = named["input"]
    if layout_of(strip).dim == 1 or named.get("training"):
        return NotImplemented
    first, *others = call(func, named | {"input": strip.local})
    return strip.like(first), *others


@operation("mean", "sum", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "prod", "argmax", "any")
def _reduce(func: Any, named: dict[str, Any]) -> Any:
    strip = named["self"]
    layout, dims = layout_of(strip), named.get("dim")
    given = [dims] if isinstance(dims, int) else dims
    gone = {dim % strip.ndim for dim in given} if given else set(range(strip.ndim))
    result = NotImplemented
    if layout.dim not in gone:
        new = layout if named.get("keepdim") else layout.at(layout.dim - sum(dim < layout.dim for dim in gone))
        result = call(func, named | {"self": strip.local})
        return _many(strip, result, [new] * len(result)) if isinstance(result, tuple) else strip.like(result, new)
    name, dtype = func.overloadpacket.__name__, named.get("dtype") or strip.dtype
    if name in ("mean", "sum") and dtype in _EXACT:
        total = strip.local.sum(sorted(gone), keepdim=bool(named.get("keepdim")), dtype=dtype)
        count = math.prod(strip.shape[dim] for dim in gone) if name == "mean" else 1
        result = strip.exchange.group.all_reduce(total) / count
    return result


@operation("mm", "bmm")
def _product(func: Any, named: dict[str, Any]) -> Any:
    one, other = named["self"], named["mat2"]
    return _multiplied(one, other, lambda left, right, _: func(left, right), is_sum_wanted=True)


@operation("addmm", "baddbmm")
def _product_onto(func: Any, named: dict[str, Any]) -> Any:
    names = ("batch1", "batch2") if func.overloadpacket.__name__ == "baddbmm" else ("mat1", "mat2")
    one, other = (named[name] for name in names)

    def compute(left: Tensor, right: Tensor, layout: Layout) -> Any:
        added = fitted(named["self"], layout, one.ndim, strips_in([one, other])[0].exchange)
        return call(func, named | {"self": added, names[0]: left, names[1]: right})

    return _multiplied(one, other, compute, is_sum_wanted=False)


def _multiplied(one: Tensor, other: Tensor, compute: Any, is_sum_wanted: bool) -> Any:
    """A product of matrices of which one or both are strips: by rows, by columns, by matrices, or in parts of the sum.

    Args:
        one: (..., n, k).
        other: (..., k, m).
        compute: the product of what each rank has, given the layout of the result.
        is_sum_wanted: parts of the sum may be added up.
    """
    strips = strips_in([one, other])
    if not strips:
        return NotImplemented
    exchange, num_dims = strips[0].exchange, one.ndim
    places = [_place(one), _place(other)]

    def product(left: Tensor, right: Tensor, layout: Layout) -> Strip:
        return Strip.of(compute(left, right, layout), layout, exchange)

    if num_dims == 3 and -3 in places:
        layout = layout_of(strips[0] if len(strips) == 1 or places[0] == -3 else strips[1])
        return product(fitted(one, layout, 3, exchange), fitted(other, layout, 3, exchange), layout)
    if isinstance(one, Strip) and places[0] == -2:
        return product(one.local, _full(other), layout_of(one))
    if isinstance(other, Strip) and places[1] == -1:
        return product(_full(one), other.local, layout_of(other))
    if not is_sum_wanted or one.dtype not in _EXACT:
        return NotImplemented
    layout = layout_of(strips[0]).at(num_dims - 2)
    left = fitted(one, layout.at(num_dims - 1), num_dims, exchange)
    total: Tensor = compute(left, fitted(other, layout, num_dims, exchange), layout)
    return exchange.group.all_reduce(total)


def _place(item: Tensor) -> int | None:
    return layout_of(item).dim - item.ndim if isinstance(item, Strip) else None


def _full(item: Any) -> Any:
    return item.whole() if isinstance(item, Strip) else item


@operation("scaled_dot_product_attention")
def _attention(func: Any, named: dict[str, Any]) -> Any:
    """Attention of this rank's queries to all keys, or to those of its own sequences."""
    query, key, value, mask = (named.get(name) for name in ("query", "key", "value", "attn_mask"))
    leading, *_ = strips_in([query, key, value, mask])
    exchange = leading.exchange
    options = {name: item for name, item in named.items() if name not in ("query", "key", "value", "attn_mask")}
    place = _place(query) if isinstance(query, Tensor) else None
    if place is None or place == -1 or (place == -2 and options.get("is_causal")):
        exchange.whole[func.__name__] += 1
        return func(
            *(_full(item) for item in (query, key, value)),
            attn_mask=_full(mask) if mask is not None else None,
            **options,
        )
    assert isinstance(query, Strip)
    layout = layout_of(query)
    mask = fitted(mask, layout, query.ndim, exchange)
    if place == -2:
        key, value = _full(key), _full(value)
    else:
        key, value = (fitted(item, layout, query.ndim, exchange) for item in (key, value))
    return query.like(func(query.local, key, value, attn_mask=mask, **options))

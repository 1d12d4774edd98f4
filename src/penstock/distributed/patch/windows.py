"""What reads neighbouring rows: convolutions, pooling, padding; and what makes several rows of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.distributed.patch.layout import Layout, Window
from penstock.distributed.patch.strip import Strip, call, operation
from penstock.distributed.patch.views import layout_of


@operation("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def _convolution(func: Any, named: dict[str, Any]) -> Any:
    strip, weight = named["input"], named["weight"]
    if not isinstance(strip, Strip) or isinstance(weight, Strip):
        return NotImplemented
    layout = layout_of(strip)
    if layout.dim == 0:  # pictures by themselves
        return strip.like(call(func, named | {"input": strip.local}))
    axis = layout.dim - 2
    if axis < 0 or not layout.is_plain:
        return NotImplemented
    figures = {name: _every(named[name], weight.ndim - 2) for name in ("stride", "padding", "dilation")}
    window = Window(weight.shape[2 + axis], *(figures[name][axis] for name in figures))
    figures["padding"][axis] = 0
    if named["transposed"]:
        figures["output_padding"] = _every(named["output_padding"], weight.ndim - 2)
        return _transposed(func, named | figures, strip, window)
    return windowed(strip, window, lambda rows: call(func, named | figures | {"input": rows}))


def windowed(strip: Strip, window: Window, compute: Callable[[Tensor], Tensor]) -> Any:
    """Run what reads rows through windows, on the rows that this rank's results need.

    Args:
        strip: what is read.
        window: along its rows.
        compute: given rows with zeros in place of padding, and reading them without any.
    """
    layout = layout_of(strip)
    made = layout.with_borders(window.borders(layout.borders))
    if made.has_empty:
        return NotImplemented
    rows = strip.exchange.rows(strip.local, layout, [window.needs(part) for part in made.ranges()])
    return strip.like(compute(rows), made)


def _transposed(func: Any, named: dict[str, Any], strip: Strip, window: Window) -> Any:
    layout, axis = layout_of(strip), layout_of(strip).dim - 2
    extra, rank = named["output_padding"][axis], strip.exchange.group.rank
    num_rows = (layout.rows - 1) * window.stride - 2 * window.padding + window.reach + 1 + extra
    made = layout.with_borders(window.borders_transposed(layout.borders, num_rows))
    needs = [window.needs_transposed(part, layout.rows) for part in made.ranges()]
    if extra > window.padding or made.has_empty or any(begin >= end for begin, end in needs):
        return NotImplemented
    named["output_padding"][axis] = 0
    result = call(func, named | {"input": strip.exchange.rows(strip.local, layout, needs)})
    begin, end = made.ranges()[rank]
    first = needs[rank][0] * window.stride - window.padding
    return strip.like(result.narrow(layout.dim, begin - first, end - begin), made)


@operation("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(func: Any, named: dict[str, Any]) -> Any:
    strip = named["self"]
    layout, num_axes = layout_of(strip), int(func.overloadpacket.__name__[-2])
    axis = layout.dim - strip.ndim + num_axes
    if axis < 0:
        return strip.like(call(func, named | {"self": strip.local}))
    kernel, padding = _every(named["kernel_size"], num_axes), _every(named["padding"], num_axes)
    stride = _every(named["stride"] or kernel, num_axes)
    if padding[axis] or named["ceil_mode"] or not layout.is_plain:
        return NotImplemented
    return windowed(strip, Window(kernel[axis], stride[axis]), lambda rows: call(func, named | {"self": rows}))


def _every(figure: int | Sequence[int], num_axes: int) -> list[int]:
    """One figure per axis."""
    figures = [figure] if isinstance(figure, int) else list(figure)
    return figures * num_axes if len(figures) == 1 else figures


@operation("constant_pad_nd")
def _pad(func: Any, named: dict[str, Any]) -> Any:
    return _padded(named["self"], named["pad"], lambda rows, pad: torch.constant_pad_nd(rows, pad, named["value"]))


@operation("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replicate(func: Any, named: dict[str, Any]) -> Any:
    return _padded(named["self"], named["padding"], func)


@operation("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflect(func: Any, named: dict[str, Any]) -> Any:
    strip, pad = named["self"], named["padding"]
    layout = layout_of(strip)
    place = 2 * (strip.ndim - 1 - layout.dim)
    if any(begin + max(pad[place : place + 2], default=0) >= end for begin, end in layout.ranges()):
        return NotImplemented  # it would reflect another rank's rows
    return _padded(strip, pad, func)


def _padded(strip: Strip, pad: Sequence[int], compute: Callable[[Tensor, list[int]], Tensor]) -> Any:
    """Pad rows at the picture's borders: those in front on the first rank, those behind on the last."""
    layout, pad = layout_of(strip), list(pad)
    place = 2 * (strip.ndim - 1 - layout.dim)
    if place >= len(pad):
        return strip.like(compute(strip.local, pad))
    before, behind = pad[place : place + 2]
    if min(before, behind) < 0 or not layout.is_plain:
        return NotImplemented
    rank, last = strip.exchange.group.rank, strip.exchange.group.size - 1
    pad[place : place + 2] = before * (rank == 0), behind * (rank == last)
    inner = [border + before for border in layout.borders[1:-1]]
    return strip.like(compute(strip.local, pad), layout.with_borders([0, *inner, layout.rows + before + behind]))


_NEAREST = [f"{name}{num}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for num in (1, 2, 3)]
_BLENDED = ["upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"]


@operation(*_NEAREST, *_BLENDED)
def _upsample(func: Any, named: dict[str, Any]) -> Any:
    """Rows are repeated; those that are blended of two must stay as they are, as only other dimensions grow."""
    strip = named["self"] if "self" in named else named["input"]
    layout, axis, name = layout_of(strip), layout_of(strip).dim - 2, func.overloadpacket.__name__
    if axis < 0 or not layout.is_plain:
        return NotImplemented
    factors = named.get("scale_factors") or [named.get(f"scales_{letter}") for letter in "dhw"[5 - strip.ndim :]]
    if strip.ndim == 3 and named.get("scales") is not None:
        factors = [named["scales"]]
    size = named.get("output_size")
    size = _scaled_size(strip, factors) if size is None else list(size)
    factor, uneven = divmod(size[axis], layout.rows)
    if uneven or factors[axis] not in (None, factor) or (name in _BLENDED and factor != 1):
        return NotImplemented
    size[axis] = strip.local.shape[layout.dim] * factor
    options = [named["align_corners"]] if name in _BLENDED else []
    result = getattr(torch.ops.aten, name).default(strip.local, size, *options, *factors)
    return strip.like(result, _scaled(layout, factor))


def _scaled_size(strip: Strip, factors: Sequence[float]) -> list[int]:
    return [int(length * factor) for length, factor in zip(strip.shape[2:], factors, strict=True)]


@operation("pixel_shuffle")
def _shuffle(func: Any, named: dict[str, Any]) -> Any:
    strip, factor = named["self"], named["upscale_factor"]
    layout = layout_of(strip)
    if layout.dim == strip.ndim - 3 or not layout.is_plain:
        return NotImplemented
    is_row = layout.dim >= strip.ndim - 2
    return strip.like(func(strip.local, factor), _scaled(layout, factor) if is_row else layout)


def _scaled(layout: Layout, factor: int) -> Layout:
    return layout.with_borders([border * factor for border in layout.borders])


@operation("pixel_unshuffle")
def _unshuffle(func: Any, named: dict[str, Any]) -> Any:
    strip, factor = named["self"], named["downscale_factor"]
    layout = layout_of(strip)
    if layout.dim == strip.ndim - 3 or not layout.is_plain:
        return NotImplemented
    if layout.dim < strip.ndim - 2:
        return strip.like(func(strip.local, factor))
    moved = layout.aligned(factor)
    if moved.has_empty:
        return NotImplemented
    local = strip.exchange.rows(strip.local, layout, moved.ranges())
    return strip.like(func(local, factor), moved.with_borders([border // factor for border in moved.borders]))

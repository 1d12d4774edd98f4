"""Strips reshaped, cut and joined: where their rows are afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from penstock.distributed.patch.layout import Layout, reshaped
from penstock.distributed.patch.strip import Strip, call, fitted, operation, strips_in


def layout_of(strip: Strip) -> Layout:
    """The layout of a strip that is one."""
    assert strip.spread is not None
    return strip.spread


@operation("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(func: Any, named: dict[str, Any]) -> Any:
    strip, size = named["self"], named.get("size", named.get("shape"))
    if size is None:
        return func.decompose(*named.values())
    layout, shape = layout_of(strip), _full(size, strip.numel())
    found = reshaped(layout, strip.shape, shape)
    if found is None or found[0].has_empty:
        return NotImplemented
    new, step = found
    local, moved = strip.local, layout.aligned(step)
    if moved.has_empty:
        return NotImplemented
    local = strip.exchange.rows(local, layout, moved.ranges())
    begin, end = new.ranges()[strip.exchange.group.rank]
    shape[new.dim] = new.outer * (end - begin) * new.inner
    result = local.reshape(shape)
    is_view = func.is_view and result.data_ptr() == strip.local.data_ptr()
    return Strip.of(result, new, strip.exchange, is_copy=strip.is_copy or (func.is_view and not is_view))


def _full(size: Sequence[int], num_elements: int) -> list[int]:
    """A shape whose -1 is filled in."""
    known = 1
    for length in size:
        known *= length if length != -1 else 1
    return [length if length != -1 else num_elements // max(known, 1) for length in size]


def _viewing(new_dim: Callable[[dict[str, Any], int, int], int | None]) -> Callable[[Any, dict[str, Any]], Any]:
    """The handler of a view that keeps rows whole: `new_dim` tells where they are, given arguments, dim and ndim."""

    def handler(func: Any, named: dict[str, Any]) -> Any:
        strip = named["self"]
        layout = layout_of(strip)
        dim = new_dim(named, layout.dim, strip.ndim)
        if dim is None:
            return NotImplemented
        result = call(func, named | {"self": strip.local})
        if isinstance(result, Tensor):
            return Strip.of(result, layout.at(dim), strip.exchange, strip.is_copy)
        return [Strip.of(part, layout.at(dim), strip.exchange, strip.is_copy) for part in result]

    return handler


def _permuted(named: dict[str, Any], dim: int, ndim: int) -> int:
    return [other % ndim for other in named["dims"]].index(dim)


def _transposed(named: dict[str, Any], dim: int, ndim: int) -> int:
    one, other = int(named.get("dim0", 0)) % ndim, int(named.get("dim1", 1)) % ndim
    return {one: other, other: one}.get(dim, dim)


def _unsqueezed(named: dict[str, Any], dim: int, ndim: int) -> int:
    return dim + int(named["dim"] % (ndim + 1) <= dim)


def _squeezed(named: dict[str, Any], dim: int, ndim: int) -> int:
    strip = named["self"]
    wanted = named.get("dim", range(ndim))
    gone = {other % ndim for other in ([wanted] if isinstance(wanted, int) else wanted)}
    return dim - sum(1 for other in gone if other < dim and strip.shape[other] == 1)


def _without(named: dict[str, Any], dim: int, ndim: int) -> int | None:
    """`select` and `unbind`: a dimension goes."""
    other = named["dim"] % ndim
    return None if other == dim else dim - (other < dim)


def _beside(named: dict[str, Any], dim: int, ndim: int) -> int | None:
    """What works along one other dimension."""
    return None if named["dim"] % ndim == dim else dim


def _beside_all(named: dict[str, Any], dim: int, ndim: int) -> int | None:
    dims = [other % ndim for other in named["dims"]]
    return None if dim in dims or not dims else dim  # `roll` without dimensions runs through all of them


operation("permute")(_viewing(_permuted))
operation("transpose", "t")(_viewing(_transposed))
operation("unsqueeze")(_viewing(_unsqueezed))
operation("squeeze")(_viewing(_squeezed))
operation("select", "unbind")(_viewing(_without))
operation("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")(_viewing(_beside))
operation("_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "glu", "index_select")(_viewing(_beside))
operation("flip", "roll")(_viewing(_beside_all))


@operation("slice")
def _slice(func: Any, named: dict[str, Any]) -> Any:
    strip = named["self"]
    layout, dim = layout_of(strip), named["dim"] % strip.ndim
    if dim != layout.dim:
        return _viewing(_beside)(func, named)
    begin, end, _ = slice(named["start"], named["end"]).indices(layout.length)
    if (begin, end, named["step"]) == (0, layout.length, 1):
        return Strip.of(strip.local, layout, strip.exchange, strip.is_copy)
    new = layout.with_borders([min(max(border - begin, 0), end - begin) for border in layout.borders])
    if named["step"] != 1 or not layout.is_plain or new.has_empty:
        return NotImplemented
    first, last = layout.ranges()[strip.exchange.group.rank]
    local = strip.local.narrow(dim, max(begin - first, 0), min(end, last) - max(begin, first))
    return Strip.of(local, new, strip.exchange, strip.is_copy)


@operation("expand")
def _expand(func: Any, named: dict[str, Any]) -> Any:
    strip, size = named["self"], list(named["size"])
    layout = layout_of(strip)
    dim = layout.dim + len(size) - strip.ndim
    size[dim] = strip.local.shape[layout.dim]
    return Strip.of(strip.local.expand(size), layout.at(dim), strip.exchange, strip.is_copy)


@operation("repeat")
def _repeat(func: Any, named: dict[str, Any]) -> Any:
    strip, repeats = named["self"], named["repeats"]
    dim = layout_of(strip).dim + len(repeats) - strip.ndim
    if repeats[dim] != 1:
        return NotImplemented
    return strip.like(strip.local.repeat(repeats), layout_of(strip).at(dim))


@operation("repeat_interleave")
def _repeat_interleave(func: Any, named: dict[str, Any]) -> Any:
    strip, repeats, dim = named["self"], named.get("repeats"), named.get("dim")
    if dim is None or not isinstance(repeats, int) or dim % strip.ndim == layout_of(strip).dim:
        return NotImplemented
    return strip.like(strip.local.repeat_interleave(repeats, dim))


@operation("cat", "stack")
def _join(func: Any, named: dict[str, Any]) -> Any:
    tensors = [item for item in named["tensors"] if item.ndim > 1 or item.numel()]  # torch skips empty ones
    leading = strips_in(tensors)[0]
    layout, is_new = layout_of(leading), func.overloadpacket.__name__ == "stack"
    dim = named["dim"] % (leading.ndim + is_new)
    if dim == layout.dim and not is_new:
        return NotImplemented
    parts = [fitted(item, layout, leading.ndim, leading.exchange) for item in tensors]
    result = func(parts, dim)
    return leading.like(result, layout.at(layout.dim + (is_new and dim <= layout.dim)))


@operation("index")
def _index(func: Any, named: dict[str, Any]) -> Any:
    strip, indices = named["self"], list(named["indices"])
    layout = layout_of(strip)
    given = [dim for dim, index in enumerate(indices) if index is not None]
    is_one = len(given) == 1 and not isinstance(indices[given[0]], Strip) and indices[given[0]].ndim == 1
    if not is_one or given[0] == layout.dim:
        return NotImplemented
    return strip.like(func(strip.local, indices))


@operation("new_empty", "new_zeros", "new_ones", "new_full")
def _new(func: Any, named: dict[str, Any]) -> Any:
    """A tensor of another shape, which only takes dtype and device from the strip."""
    return call(func, named | {"self": named["self"].local})

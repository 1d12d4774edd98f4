"""Tensors of which each rank holds a strip of rows, and that are otherwise what they are in a program for one rank.

Their shape is that of the whole tensor, so that code which decides by sizes decides as on one rank. An operation that
works within rows runs on a rank's own; those that `operation` was told of exchange rows first. Any other runs on the
whole tensor, on every rank: it is right, and costs what is saved elsewhere; `Exchange.whole` counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from penstock.distributed.group import Group
from penstock.distributed.patch.layout import Layout, Range
from penstock.errors import GenerationError

Handler = Callable[[Any, dict[str, Any]], Any]
"""Runs an operation on strips: given torch's function and its arguments by name. `NotImplemented`: on whole tensors."""

_HANDLERS: dict[str, Handler] = {}
_ATTENTION = "scaled_dot_product_attention"
_TAKEN = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_PAST_DISPATCH = ("numpy", "tolist", "__array__", "__deepcopy__", "__reduce_ex__")
"""Methods that read values from memory: given the whole tensor. All ranks must call them."""
_ROWWISE = frozenset(
    {
        *("clone", "detach", "alias", "lift_fresh", "_to_copy", "copy_", "fill_", "zero_", "zeros_like", "ones_like"),
        *("full_like", "empty_like", "masked_fill", "masked_fill_", "gelu", "hardswish", "hardswish_", "hardtanh_"),
        *("nan_to_num", "softplus", "log_sigmoid", "where"),
    }
)
"""What works element by element and is not tagged so by torch."""
_DRAWS = torch.Tag.nondeterministic_seeded


def operation(*names: str) -> Callable[[Handler], Handler]:
    """Decorate the handler of operations: their names in `torch.ops.aten`."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Exchange:
    """How the ranks of a group trade the rows of strips.

    Args:
        group: the ranks.

    Attributes:
        whole: by operation, how often it ran on whole tensors.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.whole: Counter[str] = Counter()

    def rows(self, local: Tensor, layout: Layout, needs: Sequence[Range]) -> Tensor:
        """The rows that this rank needs, from those that hold them; zeros where there are none.

        Args:
            local: this rank's rows.
            layout: of all rows.
            needs: of each rank.

        Cost: one message per pair of ranks of which one needs what the other has; a copy of the rows.
        """
        rank, held = self.group.rank, layout.ranges()
        if list(needs) == held:
            return local
        begin, end = needs[rank]
        dim = layout.dim + (not layout.is_plain)
        shape = list(local.shape)
        if not layout.is_plain:
            shape[layout.dim : layout.dim + 1] = [layout.outer, held[rank][1] - held[rank][0], layout.inner]
            local = torch.unflatten(local, layout.dim, shape[layout.dim : layout.dim + 3])
        shape[dim] = end - begin
        rows = local.new_empty(shape)

        def part(of: Tensor, first: int, wanted: Range) -> Tensor:
            return of.narrow(dim, wanted[0] - first, wanted[1] - wanted[0])

        sent, received = [], []
        for other in range(self.group.size):
            own = _common(held[rank], needs[other])
            theirs = _common(held[other], needs[rank])
            if other == rank and own is not None:
                part(rows, begin, own).copy_(part(local, held[rank][0], own))
            elif other != rank and own is not None:
                sent.append((part(local, held[rank][0], own).contiguous(), other))
            if other != rank and theirs is not None:
                shape[dim] = theirs[1] - theirs[0]
                received.append((local.new_empty(shape), other, theirs))
        for padding in ((begin, min(end, 0)), (max(begin, layout.rows), end)):
            if padding[0] < padding[1]:
                part(rows, begin, padding).zero_()
        self.group.trade(sent, [(tensor, other) for tensor, other, _ in received])
        for tensor, _, theirs in received:
            part(rows, begin, theirs).copy_(tensor)
        return rows if layout.is_plain else rows.flatten(layout.dim, layout.dim + 2)

    def take(self, tensor: Tensor, layout: Layout) -> Tensor:
        """This rank's rows of a tensor that is here whole; a view, but where rows lie in groups."""
        begin, end = layout.ranges()[self.group.rank]
        if layout.outer == 1:
            return tensor.narrow(layout.dim, begin, end - begin)
        grouped = torch.unflatten(tensor, layout.dim, (layout.outer, layout.rows, layout.inner))
        return grouped.narrow(layout.dim + 1, begin, end - begin).flatten(layout.dim, layout.dim + 2)

    def strip(self, tensor: Tensor, layout: Layout) -> Strip:
        """The strip of a tensor that is here whole."""
        return Strip.of(self.take(tensor, layout).contiguous(), layout, self)


class Strip(Tensor):
    """A rank's rows of a tensor; every rank has its own, and runs the same program.

    Gradients do not pass. What would change a part of it in place that is not a view of its rows is refused.
    """

    local: Tensor
    spread: Layout | None  # None: a whole copy of what would be a view, which nobody may write to
    exchange: Exchange
    is_copy: bool

    @classmethod
    def of(cls, local: Tensor, layout: Layout | None, exchange: Exchange, is_copy: bool = False) -> Self:
        """A strip of this rank's rows.

        Args:
            local: the rows.
            layout: of all ranks' rows.
            exchange: how they are traded.
            is_copy: the program takes it for a view of another tensor, and it is none.
        """
        shape = list(local.shape)
        if layout is not None:
            shape[layout.dim] = layout.length
        strip = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, strides=_strides(local, shape)
        )
        strip.local, strip.spread, strip.exchange, strip.is_copy = local, layout, exchange, is_copy
        return strip

    def whole(self) -> Tensor:
        """All rows, on every rank.

        Cost: receives the rows of all others.
        """
        if self.spread is None:
            return self.local
        return self.exchange.rows(self.local, self.spread, [(0, self.spread.rows)] * self.exchange.group.size)

    def like(self, local: Tensor, layout: Layout | None = None) -> Strip:
        """Another strip of the same ranks, with this layout where none is given."""
        return Strip.of(local, layout or self.spread, self.exchange)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        held = (
            "whole"
            if self.spread is None
            else f"rows {self.spread.ranges()[self.exchange.group.rank]} of dim {self.spread.dim}"
        )
        return f"Strip({held}, shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of this rank's rows: who asks whether a tensor is a view of a weight is told right."""
        return self.local.untyped_storage()

    def cut(self, layout: Layout) -> Tensor:
        """This rank's rows in another layout."""
        return self.local if self.spread == layout else self.exchange.take(self.whole(), layout)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take attention as one; leave all else to `__torch_dispatch__`, and other classes of tensors to themselves."""
        if any(kind not in (Strip, Tensor, torch.nn.Parameter) and _is_own_kind(kind) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", "")
            if name in _PAST_DISPATCH:
                return func(*tree_map_only(Strip, Strip.whole, args), **(kwargs or {}))
            if name == _ATTENTION:
                return _HANDLERS[_ATTENTION](func, dict(zip(_TAKEN, args, strict=False)) | (kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on this rank's rows, or on all."""
        kwargs = kwargs or {}
        _refuse_writing(func, args, kwargs)
        args, kwargs = tree_map_only(Strip, _readable, (args, kwargs))
        if not any(isinstance(leaf, Strip) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        result = NotImplemented
        if name in _HANDLERS:
            result = _HANDLERS[name](func, _by_name(func, args, kwargs))
        elif (torch.Tag.pointwise in func.tags or name in _ROWWISE) and _DRAWS not in func.tags:
            result = elementwise(func, args, kwargs)
        else:
            result = func.decompose(*args, **kwargs)  # inference mode hands over composite operations whole
        return _whole(func, args, kwargs) if result is NotImplemented else result


def call(func: Any, named: dict[str, Any]) -> Any:
    """Call an operation with its arguments by name."""
    arguments = func._schema.arguments
    args = [named[item.name] for item in arguments if item.name in named and not item.kwarg_only]
    return func(*args, **{item.name: named[item.name] for item in arguments if item.kwarg_only and item.name in named})


def strips_in(values: Any) -> list[Strip]:
    """The strips among arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Strip)]


def fitted(value: Any, layout: Layout, num_dims: int, exchange: Exchange) -> Any:
    """What takes part in an operation beside strips, cut as they are; broadcast tensors stay.

    Args:
        value: anything; only tensors are cut.
        layout: of a tensor with `num_dims` dimensions, to whose last ones those of `value` belong.
        num_dims: of it.
        exchange: of the strips.
    """
    if not isinstance(value, Tensor):
        return value
    dim = layout.dim - num_dims + value.ndim
    if dim < 0 or value.shape[dim] != layout.length:
        return value.whole() if isinstance(value, Strip) else value
    return value.cut(layout.at(dim)) if isinstance(value, Strip) else exchange.take(value, layout.at(dim))


def elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that takes its operands element by element, broadcast to each other."""
    written = args[0] if func._schema.is_mutable and args else None
    if "out" in kwargs or (isinstance(written, Tensor) and not isinstance(written, Strip)):
        return NotImplemented
    strips = strips_in((args, kwargs))
    leading = written if isinstance(written, Strip) else max(strips, key=lambda strip: strip.ndim)
    layout = leading.spread
    assert layout is not None
    args, kwargs = tree_map(lambda leaf: fitted(leaf, layout, leading.ndim, leading.exchange), (args, kwargs))
    result = func(*args, **kwargs)
    if written is not None:
        return written
    return leading.like(result, layout.at(layout.dim - leading.ndim + result.ndim))


def _whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on whole tensors, on every rank."""
    leading = strips_in((args, kwargs))[0]
    written = [args[index] for index in _written(func) if index < len(args)]
    if any(isinstance(item, Strip) for item in written):
        raise _unwritable(func, leading)
    leading.exchange.whole[func.overloadpacket.__name__] += 1
    result = func(*tree_map_only(Strip, Strip.whole, args), **tree_map_only(Strip, Strip.whole, kwargs))
    if func.is_view:  # who writes to it means the strip
        return tree_map_only(Tensor, lambda part: Strip.of(part, None, leading.exchange), result)
    return result


def _refuse_writing(func: Any, args: Any, kwargs: Any) -> None:
    for index in _written(func):
        target = args[index] if index < len(args) else None
        if isinstance(target, Strip) and (target.is_copy or target.spread is None):
            raise _unwritable(func, target)


def _unwritable(func: Any, strip: Strip) -> GenerationError:
    return GenerationError(
        f"{func} writes to a part of a tensor of shape {tuple(strip.shape)} whose rows are spread over "
        f"{strip.exchange.group.size} ranks, and that part lies on several. Use --vae-parallel-mode tile, or leave "
        "vae_patch_parallel_size at 1."
    )


def _written(func: Any) -> Iterable[int]:
    if not func._schema.is_mutable:
        return ()
    return [
        index
        for index, item in enumerate(func._schema.arguments)
        if item.alias_info is not None and item.alias_info.is_write
    ]


def _readable(strip: Strip) -> Tensor:
    return strip if strip.spread is not None else strip.local


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by their names, defaults included."""
    named: dict[str, Any] = {
        item.name: item.default_value for item in func._schema.arguments if item.has_default_value()
    }
    named.update(zip((item.name for item in func._schema.arguments), args, strict=False))
    named.update(kwargs)
    return named


def _is_own_kind(kind: Any) -> bool:
    """Whether a tensor class has torch functions of its own."""
    own = getattr(kind.__torch_function__, "__func__", None)  # torch's switched-off one is no method
    return own is not None and own is not getattr(Tensor.__torch_function__, "__func__", None)


def _common(one: Range, other: Range) -> Range | None:
    begin, end = max(one[0], other[0]), min(one[1], other[1])
    return (begin, end) if begin < end else None


def _strides(local: Tensor, shape: Sequence[int]) -> list[int] | None:
    """Strides of a whole tensor whose dimensions lie in the order of its strip's."""
    if local.is_contiguous():
        return None
    strides, step = [0] * local.ndim, 1
    for dim in sorted(range(local.ndim), key=lambda dim: (local.stride(dim), -dim)):
        if local.stride(dim) or local.shape[dim] == 1:
            strides[dim] = step
            step *= shape[dim]
    return strides

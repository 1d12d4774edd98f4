"""Stand-ins for weights that are not on the device: they know shape, dtype and device, and fetch themselves when used.

Whatever way a pipeline takes to a weight (a method other than `forward`, a submodule called by itself, a parameter
read directly), the first operation on the stand-in brings the weight. A stand-in that got past this would be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from penstock.errors import UsageError
from penstock.weights.ranges import CACHE_LINE_BYTES

_T = torch.Tensor
_DESCRIBING: frozenset[Any] = frozenset(
    {
        *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
        *(getattr(_T, name).__get__ for name in ("is_mps", "is_cpu", "is_meta", "is_sparse", "is_quantized", "layout")),
        *(getattr(_T, name).__get__ for name in ("is_nested", "is_leaf", "grad", "itemsize", "nbytes", "grad_fn")),
        _T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.stride, _T.is_floating_point, _T.is_complex,
        *(getattr(_T, name).__get__ for name in ("_backward_hooks", "_post_accumulate_grad_hooks", "output_nr")),
        _T.__len__, _T.is_contiguous, _T.get_device, _T.is_pinned, _T.is_shared, _T.is_inference, _T.dim_order,
        _T.register_hook, _T.register_post_accumulate_grad_hook,
        getattr(_T, "grad").__set__,  # noqa: B009
    }
)  # fmt: skip
"""What tells about a weight, or is hung on it, without needing its values: its view on the device answers."""

_SET_FLAG: Any = getattr(_T, "requires_grad").__set__  # noqa: B009
_OWN = frozenset({"fetch", "unit", "live", "_is_param"})


_DETACHING: frozenset[Any] = frozenset({_T.detach, getattr(_T, "data").__get__})  # noqa: B009
"""What gives a weight without its gradients, to be read or, which is refused, to be written to."""


class ColdTensor(torch.Tensor):
    """A parameter or buffer whose values are elsewhere.

    `fetch` brings the weight to the device and returns it; weights of one `unit` are there together. `live` is the
    weight's view of its place, whose values are those of other weights at times.
    """

    fetch: Callable[[], torch.Tensor]
    unit: object
    live: torch.Tensor | None

    @classmethod
    def of(
        cls,
        tensor: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        fetch: Callable[[], Any],
        unit: object = None,
        live: torch.Tensor | None = None,
    ) -> Self:
        """The stand-in for a weight as it will be on the device.

        Args:
            tensor: the weight.
            device: where it will be.
            dtype: that it will have.
            fetch: brings it.
            unit: with which it comes.
            live: tells about it; the stand-in itself where left out.

        Cost: a few bytes; its elements share one NaN.
        """
        with torch.inference_mode(False):
            value = math.nan if dtype.is_floating_point or dtype.is_complex else 0
            one = torch.full((), value, dtype=torch.float32).to(device=device, dtype=dtype)
            cold = torch.Tensor._make_subclass(cls, one.expand(tensor.shape), tensor.requires_grad)
        cold.fetch, cold.unit, cold.live = fetch, unit, live
        if isinstance(tensor, torch.nn.Parameter):
            cold._is_param = True  # what makes `isinstance(cold, nn.Parameter)` true
        return cold

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Describe without fetching; refuse to be written to; for all else fetch, and go on with the weight."""
        kwargs = kwargs or {}
        if func is _T.__hash__:
            return id(args[0])
        if func in _DESCRIBING and isinstance(args[0], ColdTensor):
            with torch._C.DisableTorchFunctionSubclass():
                return func(_described(args[0]), *args[1:], **kwargs)
        if func in (_SET_FLAG, _T.requires_grad_):
            return _flagged(*args, **kwargs)
        if func is torch.Tensor.__repr__:
            with torch._C.DisableTorchFunctionSubclass():
                cold = args[0]
                return f"ColdTensor(shape={tuple(cold.shape)}, dtype={cold.dtype}, device='{cold.device}')"
        if func in _DETACHING:
            return _detached(args[0])
        if _writes(func) and isinstance(next(iter((*args, *kwargs.values())), None), ColdTensor):
            name = func.__name__ if func.__name__ != "__set__" else "assigning to .data"
            raise UsageError(
                f"{name} would change a weight that penstock streams, and the change would be lost at its "
                "next fill. Call remove() on what penstock.apply returned, change the weights, and apply again."
            )
        units = {id(cold.unit) for cold in tree_leaves((args, kwargs)) if isinstance(cold, ColdTensor)}
        fetch = _fetched if len(units) == 1 else _copied  # the second unit's place may be the first one's
        live = [fetch(cold) for cold in tree_leaves((args, kwargs)) if isinstance(cold, ColdTensor)]
        weights = iter(live)
        result = func(
            *tree_map_only(ColdTensor, lambda _: next(weights), args),
            **tree_map_only(ColdTensor, lambda _: next(weights), kwargs),
        )
        if func is torch.Tensor.numpy:
            return result.copy()

        def apart(value: torch.Tensor) -> torch.Tensor:  # not a view of a place that is filled anew
            return _copy(value) if any(_is_view(value, weight) for weight in live) else value

        return tree_map_only(torch.Tensor, apart, result)

    def release(self, weight: torch.Tensor) -> None:
        """Stand for a weight that is there from now on."""
        self.fetch, self.live = lambda: weight, weight

    def __getattr__(self, name: str) -> Any:
        """An attribute that somebody has set on the weight."""
        live = vars(self).get("live")
        if live is None or name not in vars(live):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return vars(live)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute on the weight, where it is not one of torch's."""
        live = vars(self).get("live")
        if live is None or name in _OWN or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            vars(live)[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled or copied, it is its weight."""
        with torch.no_grad():
            reduce: Any = _copied(self).__reduce_ex__
        return reduce(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        """A copy is a weight of its own."""
        with torch.no_grad():
            return _copied(self)


def _described(cold: ColdTensor) -> torch.Tensor:
    return cold if cold.live is None else cold.live


def _flagged(cold: ColdTensor, requires_grad: bool = True) -> ColdTensor:
    """What adapters do to the weights beside them."""
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in (cold, _described(cold)):
            tensor.requires_grad = requires_grad
    return cold


def _detached(cold: ColdTensor) -> ColdTensor:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        live = _described(cold).detach()
    return ColdTensor.of(live, live.device, live.dtype, lambda: cold.fetch().detach(), cold.unit, live)


def _fetched(cold: ColdTensor) -> torch.Tensor:
    return cold.fetch()


def _is_view(result: torch.Tensor, weight: torch.Tensor) -> bool:
    if result.layout is not torch.strided:
        return False
    return result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; on the CPU at the same place within a cache line, because kernels round by it."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor.clone()
    memory = torch.empty(tensor.numel() * tensor.itemsize + CACHE_LINE_BYTES, dtype=torch.uint8)
    begin = (tensor.data_ptr() - memory.data_ptr()) % CACHE_LINE_BYTES
    if begin % tensor.itemsize:
        return tensor.clone()
    place = memory[begin : begin + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


def _copied(cold: ColdTensor) -> torch.Tensor:
    """A copy that torch takes for the weight; where gradients are recorded, they go to the weight."""
    weight = cold.fetch()
    if torch.is_grad_enabled() and weight.requires_grad:
        return _copy(weight)
    copied = _copy(weight.detach())
    return torch.nn.Parameter(copied, weight.requires_grad) if isinstance(cold, torch.nn.Parameter) else copied


def _writes(func: Any) -> bool:
    """Whether an operation changes its first argument: `copy_` and its like, `+=`, and assignments."""
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__"):
        return True
    return name.endswith("_") and not name.startswith("_")

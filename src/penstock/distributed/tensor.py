"""Tensor parallelism: each rank holds a slice of every large layer, and the ranks sum what each makes of it.

Within a block the layers come in pairs: one gives every rank some of the heads (or of the feed-forward's width), the
other takes them in, and its outputs are summed: one all-reduce for each pair. What lies between blocks is whole and
equal on all ranks, so that everything outside the pairs runs as it is.

Owns the surgery. Which layers are cut stands in `models.rows.tensor`. Does not know who runs the denoiser, or where
its weights are kept: they may be exchanged from call to call, and are looked up in every call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.distributed.slices import IsMapped, Slicing, Surgery, cut, keep_slice
from penstock.distributed.whole import refuse_while_split
from penstock.errors import ConfigError, GenerationError
from penstock.models.rows.tensor import PLANS, Local, Norm, Split, Style, TensorPlan, tensor_plan_of
from penstock.undo import Undo

_SHOWN = 3
_WITHOUT_ADAPTER = "Merge it with fuse_lora() and unload_lora_weights() first"


@dataclass(frozen=True)
class _Place:
    """A module that a plan names."""

    pattern: str
    path: str
    module: nn.Module
    holder: nn.Module
    style: Style

    @property
    def name(self) -> str:
        """Of the module in its holder."""
        return self.path.rpartition(".")[2]


def apply_tensor(denoiser: nn.Module, group: Group, is_mapped: IsMapped = lambda weight: False) -> Undo:
    """Leave on this rank its slice of the denoiser; its forward then gives on every rank what it gave whole.

    All ranks of the group call it, with equal weights, and later the undo. For inference: gradients are not summed.

    Args:
        denoiser: on any device, meta included. Weights may be moved, loaded or streamed afterwards.
        group: ranks of the tensor axis.
        is_mapped: whether a weight lies in a mapped file. Slices of such weights stay views where they can, and the
            undo puts the weight itself back. By default none does.

    Returns:
        What restores every Parameter (the same objects), attribute and forward. Weights of memory were let go, and are
        gathered again: a collective, for which the weights must be in place (no longer streamed).

    Raises:
        ConfigError: as `check_tensor`, but that a plan may name nothing here: one rank alone may hold such blocks.
            Nothing was changed.

    Cost: nothing is sent. Allocates this rank's share, one weight at a time. In each forward one all-reduce of the
        output for each "rowwise" layer, and one of a number per token for each norm across heads.
    """
    if group.size == 1:
        return Undo()
    places = _checked(denoiser, group.size)
    with Undo() as undo:
        surgery = Surgery(group, undo, is_mapped)
        for place in places:
            if isinstance(place.style, Split):
                _split(place, place.style, surgery)
            elif isinstance(place.style, Norm):
                _split_norm(place.module, surgery)
            else:
                _localise(place.module, place.style, group, undo)
        _guard(denoiser, places, group.size, undo)
        surgery.is_over = True
    return undo


def check_tensor(denoiser: nn.Module, size: int) -> None:
    """Refuse a denoiser that cannot be cut for so many ranks.

    Args:
        denoiser: its weights may be on the meta device.
        size: number of ranks.

    Raises:
        ConfigError: for a class without a plan, heads or widths that the size does not divide (with the nearest size
            that divides all of them), and layers that are not plain: adapters, quantised or tied weights, hooks.
    """
    if size == 1:
        return
    places = _checked(denoiser, size)
    if not any(isinstance(place.style, Split) and place.style.dim == 1 for place in places):
        name = type(denoiser).__name__
        raise ConfigError(f"tensor({size}) would cut nothing of {name}: its plan names no layer that it has.")


def _checked(denoiser: nn.Module, size: int) -> list[_Place]:
    name = type(denoiser).__name__
    plan = tensor_plan_of(denoiser)
    if plan is None:
        raise ConfigError(
            f"tensor({size}) cannot cut {name}: nothing says which of its layers belong together. Declare a `_tp_plan` "
            "on the class (about six lines of data that name its attention and feed-forward layers), or leave "
            f"--tensor-parallel-size at 1. Plans are there for Flux, Flux 2, Qwen-Image and {', '.join(sorted(PLANS))}."
        )
    places = list(_places(denoiser, plan))
    for place in places:
        _require_plain(place)
    _require_untied(denoiser, places)
    _require_divisible(places, size)
    return places


def _places(denoiser: nn.Module, plan: TensorPlan) -> Iterator[_Place]:
    """The modules that a plan names, each once."""
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    seen: set[int] = set()
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        for path, module in modules.items():
            if expression.fullmatch(path) and id(module) not in seen:
                seen.add(id(module))
                yield _Place(pattern, path, module, modules[path.rpartition(".")[0]], style)


def _require_plain(place: _Place) -> None:
    """Refuse what is more than the layer that the plan means."""
    if isinstance(place.style, Local):
        return
    kind: type[nn.Module] = nn.Linear if isinstance(place.style, Split) else nn.RMSNorm
    if getattr(place.holder, "fused_projections", False):
        _refuse(place, "the projections beside it are fused. Call unfuse_qkv_projections() first")
    if _is_prompted(place.holder):
        _refuse(place, "the attention processor has weights of its own (IP-Adapter). Call unload_ip_adapter() first")
    if hasattr(place.module, "base_layer"):
        _refuse(place, f"it carries an adapter (LoRA), which would stay whole. {_WITHOUT_ADAPTER}")
    if type(place.module).forward is not kind.forward:
        _refuse(
            place, f"it is a {type(place.module).__name__}, no {kind.__name__}. Load the model without quantisation"
        )
    if "forward" in vars(place.module):
        _refuse(place, "its forward was replaced (device_map, CPU offload, layerwise casting). Load the model without")
    for weight in place.module.parameters(recurse=False):
        is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
        if not is_plain or not weight.is_floating_point() or weight.itemsize < 2:
            found = f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            _refuse(place, f"its weight is no plain tensor ({found}). Load the model without quantisation")


def _is_prompted(holder: nn.Module) -> bool:
    processor = holder._modules.get("processor")
    return processor is not None and next(processor.parameters(), None) is not None


def _refuse(place: _Place, reason: str) -> None:
    raise ConfigError(f"Tensor parallelism cannot cut {place.path}: {reason}, or leave --tensor-parallel-size at 1.")


def _require_untied(denoiser: nn.Module, places: list[_Place]) -> None:
    """Refuse a weight of two layers: what one of them cut would be missing in the other."""
    owners = Counter(
        id(weight) for module in denoiser.modules() for weight in module._parameters.values() if weight is not None
    )
    for place in places:
        weights = [] if isinstance(place.style, Local) else list(place.module.parameters(recurse=False))
        if any(owners[id(weight)] > 1 for weight in weights):
            _refuse(place, "it shares its weight with another layer. Give each a copy of its own")


def _require_divisible(places: list[_Place], size: int) -> None:
    counts = [(place, what, count) for place in places for what, count in _counts(place)]
    odd: dict[tuple[str, int], str] = {}  # alike layers of one stack are named once
    for place, what, count in sorted(counts, key=lambda found: not found[1].startswith("heads")):
        if count % size:
            odd.setdefault((_named(what, place.pattern), count), f"{_named(what, place.path)} ({count})")
    if odd:
        every = math.gcd(*(count for _, _, count in counts))
        nearest = min((n for n in range(1, every + 1) if every % n == 0), key=lambda n: (abs(n - size), -n))
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise ConfigError(
            f"tensor({size}) does not divide {', '.join(list(odd.values())[:_SHOWN])}{more}. Each rank takes as many "
            f"whole heads, and as much of each width, as any other. Try --tensor-parallel-size {nearest}."
        )


def _counts(place: _Place) -> Iterator[tuple[str, int]]:
    """What the number of ranks must divide, with what it counts."""
    if not isinstance(place.style, Split):
        return
    heads = getattr(place.holder, "heads", getattr(place.holder, "num_heads", None))
    if isinstance(heads, int):
        yield "heads of {holder}", heads
        width, kv_width = (getattr(place.holder, name, None) for name in ("inner_dim", "inner_kv_dim"))
        if isinstance(width, int) and isinstance(kv_width, int):
            yield "heads of keys and values of {holder}", kv_width * heads // width
    assert isinstance(place.module, nn.Linear)
    for part in place.style.parts(place.module, place.holder):
        yield "width of {layer}", part


def _named(what: str, path: str) -> str:
    return what.format(layer=path, holder=path.rpartition(".")[0])


def _guard(denoiser: nn.Module, places: list[_Place], size: int, undo: Undo) -> None:
    """Refuse to run the denoiser with layers that came after it was cut: nobody sums what these make."""
    holders = list({id(place.holder): place.holder for place in places}.values())

    def mend() -> None:
        for place in places:
            place.holder._modules[place.name] = place.module

    def check(*_: Any) -> None:
        strange = [place.path for place in places if place.holder._modules.get(place.name) is not place.module]
        if strange or any(map(_is_prompted, holders)):
            what = f"{strange[0]} was replaced" if strange else "an attention processor got weights of its own"
            raise GenerationError(
                f"{what} after {type(denoiser).__name__} was cut for {size} ranks: adapters would be summed wrongly. "
                "Take penstock off the pipeline, or load it again; load or fuse adapters before it is split."
            )

    undo.add(mend)
    refuse_while_split(denoiser, f"over {size} ranks, each with a slice of every layer", undo, mend)
    undo.add(denoiser.register_forward_pre_hook(check).remove)


def _split(place: _Place, style: Split, surgery: Surgery) -> None:
    layer, size, undo = place.module, surgery.group.size, surgery.undo
    assert isinstance(layer, nn.Linear)
    parts = tuple(style.parts(layer, place.holder))
    slicing = Slicing(style.dim, parts, surgery.group)
    keep_slice(layer, "weight", slicing, surgery)
    if style.dim == 0:
        if layer.bias is not None:
            keep_slice(layer, "bias", slicing, surgery)
        _divide(layer, "out_features", size, undo)
    else:
        _divide(layer, "in_features", size, undo)
        _replace_forward(layer, _summed(layer, surgery.group), undo)


def _split_norm(norm: nn.Module, surgery: Surgery) -> None:
    assert isinstance(norm, nn.RMSNorm)
    if norm.elementwise_affine:
        keep_slice(norm, "weight", Slicing(0, norm.normalized_shape, surgery.group), surgery)
    _replace_forward(norm, _normed(norm, surgery.group), surgery.undo)


def _localise(module: nn.Module, style: Local, group: Group, undo: Undo) -> None:
    for name in style.attributes:
        if isinstance(getattr(module, name, None), int):
            _divide(module, name, group.size, undo)
    if style.rotary:
        undo.add(module.register_forward_pre_hook(_turned(style, group), with_kwargs=True).remove)


def _divide(module: nn.Module, name: str, size: int, undo: Undo) -> None:
    whole = getattr(module, name)
    undo.add(lambda: setattr(module, name, whole))
    setattr(module, name, whole // size)


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor], undo: Undo) -> None:
    undo.add(lambda: vars(module).pop("forward", None))
    vars(module)["forward"] = forward


def _summed(layer: nn.Linear, group: Group) -> Callable[[Tensor], Tensor]:
    """The forward of a layer that holds some of its inputs."""

    def forward(inputs: Tensor) -> Tensor:
        outputs = group.all_reduce(F.linear(inputs, layer.weight))
        return outputs if layer.bias is None else outputs + layer.bias

    return forward


def _normed(norm: nn.RMSNorm, group: Group) -> Callable[[Tensor], Tensor]:
    """The forward of a norm over a width of which each rank has a slice."""

    def forward(inputs: Tensor) -> Tensor:
        exact = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        squares = group.all_reduce(exact.square().sum(-1, keepdim=True))
        eps = torch.finfo(exact.dtype).eps if norm.eps is None else norm.eps
        outputs = exact * torch.rsqrt(squares / (inputs.shape[-1] * group.size) + eps)
        return (outputs if norm.weight is None else outputs * norm.weight).to(inputs.dtype)

    return forward


def _turned(style: Local, group: Group) -> Callable[..., Any]:
    """A hook that leaves of a rotation what this rank's heads need."""

    def own(table: Tensor) -> Tensor:
        dim = style.rotary_dims[table.ndim]
        return cut(table, dim, (table.shape[dim],), group.rank, group.size)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in style.rotary if kwargs.get(name) is not None}
        return args, {**kwargs, **{name: tuple(own(table) for table in tables) for name, tables in given.items()}}

    return before

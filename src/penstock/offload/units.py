"""Units: what moves as one. A block of a stack, the rest of a component, or a whole component.

Owns the partition of a pipeline's weights into units, with tied weights, views of one storage and odd strides kept as
they are. Does not know when a unit moves or where it lies on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from penstock.errors import ConfigError
from penstock.models.components import Component
from penstock.models.stacks import find_stacks
from penstock.offload.likeness import made_like
from penstock.profile import Role
from penstock.weights.ranges import Cast, HostRange, Piece, Range, Unread, memory_of

Locate = Callable[[str, torch.Tensor, int], Range | None]
"""(name, tensor, bytes it extends over) -> where a weight is stored, or None for one that only memory has."""

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_SHOWN = 5  # names in an error


@dataclass(eq=False)
class Weight:
    """One parameter or buffer of one module.

    Attributes:
        name: from the pipeline, such as `transformer.proj_out.weight`.
        table: the `_parameters` or `_buffers` of the module that uses it.
        key: its name there.
        original: the tensor that was found there.
        dtype: that it has on the device.
    """

    name: str
    table: dict[str, Any]
    key: str
    original: torch.Tensor
    dtype: torch.dtype
    piece: int = -1
    offset: int = 0

    @property
    def extent(self) -> int:
        """Bytes of memory from its first element to its last, in its stored dtype."""
        tensor = self.original
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return (last + 1) * tensor.itemsize

    def restored(self, casts: dict[int, torch.Tensor]) -> torch.Tensor:
        """What to leave in its place in the end: the tensor that was found, in the dtype that was asked for.

        Args:
            casts: by the id of what was found, what was made of it already, so that tied weights stay tied.
        """
        original = self.original
        if original.dtype == self.dtype:
            return original
        if id(original) not in casts:
            with torch.inference_mode(False), torch.no_grad():
                cast = original.detach().to(self.dtype)
            casts[id(original)] = made_like(original, cast)
        return casts[id(original)]

    def view(self, memory: torch.Tensor, position: int) -> torch.Tensor:
        """This weight in a unit's memory, its piece being at `position`."""
        begin = position + self.offset
        length = self.extent // self.original.itemsize * self.dtype.itemsize
        flat = memory[begin : begin + length].view(self.dtype)
        return flat.as_strided(self.original.shape, self.original.stride(), flat.storage_offset())


@dataclass(eq=False)
class Unit:
    """Weights that move as one.

    Attributes:
        name: from the pipeline, such as `transformer.transformer_blocks.3`, or `transformer (rest)`.
        component: name of the component it belongs to.
        module: the block or component whose forward uses it.
        weights: what is bound when the unit is on the device.
        pieces: the bytes, in order; each `Weight.piece` is an index into them.
        is_block: whether it is a block of a stack.
    """

    name: str
    component: str
    module: nn.Module
    weights: list[Weight] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    is_block: bool = False


@dataclass(eq=False)
class ComponentUnits:
    """A component taken apart.

    Attributes:
        rest: what is outside its blocks, or all of it; None where nothing is.
        blocks: the units of its stacks, in their supposed order.
    """

    name: str
    role: Role
    module: nn.Module
    rest: Unit | None
    blocks: list[Unit]

    @property
    def units(self) -> list[Unit]:
        """All, in order."""
        return [*([self.rest] if self.rest else []), *self.blocks]


@dataclass(eq=False)
class Partition:
    """A pipeline taken apart.

    Attributes:
        components: in the order of the pipeline.
        shared: weights that several components use; they stay on the device.
        fixed: buffers that only memory has, adapters, and weights without elements: they stay on the device, outside of
            units.
    """

    components: list[ComponentUnits]
    shared: Unit | None
    fixed: list[Weight]

    @property
    def units(self) -> list[Unit]:
        """All units."""
        return [*(unit for part in self.components for unit in part.units), *([self.shared] if self.shared else [])]

    @property
    def fixed_bytes(self) -> int:
        """Bytes of what is outside of units, each tensor once."""
        tensors = {id(weight.original): weight for weight in self.fixed}
        return sum(weight.original.numel() * weight.dtype.itemsize for weight in tensors.values())


def take_apart(
    components: Sequence[Component],
    locate: Locate,
    is_layerwise: bool,
    dtypes: Mapping[int, torch.dtype] | None = None,
) -> Partition:
    """Partition the weights of a pipeline's components into units.

    Args:
        components: as discovered; a module inside another belongs to the inner component.
        locate: where a weight is stored.
        is_layerwise: blocks of the denoisers' and encoders' stacks are units of their own.
        dtypes: by the tensor's id, the dtype wanted on the device; as it is where left out.

    Raises:
        ConfigError: naming the parameters that cannot be streamed, and their kinds.
    """
    claimed: set[int] = set()
    parts = []
    inner_first = sorted(components, key=lambda component: -sum(1 for _ in _holders(component, components)))
    for component in inner_first:
        parts.append(_component_units(component, is_layerwise, claimed, dtypes or {}))
    order = {component.name: number for number, component in enumerate(components)}
    parts.sort(key=lambda part: order[part.name])
    _require_plain(weight for part in parts for unit in part.units for weight in unit.weights)
    fixed = _set_apart_fixed(parts, locate, adapter_tensors(component.module for component in components))
    shared = _set_apart_shared(parts)
    partition = Partition(parts, shared, fixed)
    for unit in partition.units:
        _find_pieces(unit, locate)
    for part in parts:
        part.blocks = [unit for unit in part.blocks if unit.weights]
        part.rest = part.rest if part.rest and part.rest.weights else None
    return partition


def _holders(component: Component, others: Sequence[Component]) -> Iterator[Component]:
    for other in others:
        if other is not component and any(inner is component.module for inner in other.module.modules()):
            yield other


def _component_units(
    component: Component, is_layerwise: bool, claimed: set[int], dtypes: Mapping[int, torch.dtype]
) -> ComponentUnits:
    has_stacks = is_layerwise and component.role in ("denoiser", "encoder")
    stacks = find_stacks(component.module) if has_stacks else ()
    names = {id(module): name for name, module in component.module.named_modules()}
    blocks = []
    for stack in stacks:
        for block in stack.blocks:
            name = f"{component.name}.{names.get(id(block), stack.path)}"
            unit = Unit(name, component.name, block, is_block=True)
            unit.weights = list(_weights(block, names, component.name, claimed, dtypes))
            blocks.append(unit)
    rest_name = f"{component.name} (rest)" if blocks else component.name
    rest = Unit(rest_name, component.name, component.module)
    rest.weights = list(_weights(component.module, names, component.name, claimed, dtypes))
    return ComponentUnits(component.name, component.role, component.module, rest, blocks)


def _weights(
    module: nn.Module, names: Mapping[int, str], component: str, claimed: set[int], dtypes: Mapping[int, torch.dtype]
) -> Iterator[Weight]:
    """The weights of a module and those inside it that no other unit has claimed."""
    for inner in module.modules():
        if id(inner) in claimed:
            continue
        claimed.add(id(inner))
        path = names.get(id(inner), "")
        for table in (inner._parameters, inner._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    yield Weight(f"{component}.{name}", table, key, tensor, dtypes.get(id(tensor), tensor.dtype))


def _require_plain(weights: Iterable[Weight]) -> None:
    odd = [f"{weight.name} ({kind})" for weight in weights if (kind := _odd_kind(weight.original))]
    if odd:
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise ConfigError(
            f"{len(odd)} weights cannot be streamed: {', '.join(odd[:_SHOWN])}{more}. Use --offload none "
            "(offload='none'), or load the model without quantisation, without device_map, and on the CPU."
        )


def _odd_kind(tensor: torch.Tensor) -> str | None:
    if type(tensor) not in _PLAIN:
        return type(tensor).__name__
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.device.type not in ("cpu", "meta"):
        return f"already on {tensor.device}"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugate or negative that was never computed"
    return "quantised" if tensor.is_quantized else None


def _set_apart_fixed(parts: Sequence[ComponentUnits], locate: Locate, adapters: set[int]) -> list[Weight]:
    fixed: list[Weight] = []
    for part in parts:
        for unit in part.units:
            moving: list[Weight] = []
            for weight in unit.weights:
                stays = id(weight.original) in adapters or _is_fixed(weight, locate)
                (fixed if stays else moving).append(weight)
            unit.weights = moving
    return fixed


def adapter_tensors(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of tensors of adapters, which peft exchanges in place at any time: they stay on the device."""
    found: set[int] = set()
    for outer in modules:
        for module in outer.modules():
            names = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
            for adapter in (getattr(module, name, None) for name in names):
                if isinstance(adapter, nn.Module):
                    found.update(id(tensor) for tensor in (*adapter.parameters(), *adapter.buffers()))
    return found


def _is_fixed(weight: Weight, locate: Locate) -> bool:
    if weight.original.numel() == 0:
        return True
    is_buffer = not isinstance(weight.original, nn.Parameter)
    return is_buffer and locate(weight.name, weight.original, weight.extent) is None


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor begins in memory; without memory (on the meta device) a number of its own."""
    return id(tensor) << 48 if tensor.is_meta else tensor.data_ptr()


def _set_apart_shared(parts: Sequence[ComponentUnits]) -> Unit | None:
    """Move weights whose memory several units use to the rest of their component, or of all."""
    entries = [(weight, unit, part) for part in parts for unit in part.units for weight in unit.weights]
    shared = Unit("shared", "", nn.Module())
    order = {id(weight): number for number, (weight, _, _) in enumerate(entries)}

    def place(entry: tuple[Weight, Any, Any]) -> int:
        return order[id(entry[0])]

    groups = [sorted(group, key=place) for group in _overlapping(entries)]
    for group in sorted(groups, key=lambda group: place(group[0])):  # alike on all ranks, wherever their memory is
        units = {id(unit): unit for _, unit, _ in group}
        if len(units) == 1:
            continue
        owners = {id(part): part for _, _, part in group}
        home = shared if len(owners) > 1 else next(iter(owners.values())).rest
        assert home is not None
        for weight, unit, _ in group:
            unit.weights.remove(weight)
            home.weights.append(weight)
    return shared if shared.weights else None


def _overlapping(entries: Sequence[tuple[Weight, Any, Any]]) -> Iterator[list[tuple[Weight, Any, Any]]]:
    """Group entries whose weights' memory overlaps."""
    group: list[tuple[Weight, Any, Any]] = []
    end = -1
    for entry in sorted(entries, key=lambda entry: _address(entry[0].original)):
        begin = _address(entry[0].original)
        if group and begin >= end:
            yield group
            group = []
        group.append(entry)
        end = max(end, begin + entry[0].extent) if len(group) > 1 else begin + entry[0].extent
    if group:
        yield group


def _find_pieces(unit: Unit, locate: Locate) -> None:
    """Fill in the unit's pieces, and each weight's place in one; in the order of the weights, alike on all ranks."""
    unit.pieces = []
    order = {id(weight): number for number, weight in enumerate(unit.weights)}
    groups = [[weight for weight, _, _ in group] for group in _overlapping([(w, None, None) for w in unit.weights])]
    for weights in sorted(groups, key=lambda group: min(order[id(weight)] for weight in group)):
        begin = _address(weights[0].original)
        end = max(_address(weight.original) + weight.extent for weight in weights)
        cast = _cast(weights)
        first = weights[0]
        place = locate(first.name, first.original, end - begin)
        if place is None and first.original.is_meta:
            place = Unread(end - begin)
        elif place is None:
            start = first.original.storage_offset() * first.original.itemsize
            place = HostRange(memory_of(first.original, int(start), end - begin))
        for weight in weights:
            weight.piece = len(unit.pieces)
            distance = _address(weight.original) - begin
            weight.offset = distance // weight.original.itemsize * weight.dtype.itemsize
        itemsize = max(weight.dtype.itemsize for weight in weights)
        unit.pieces.append(Piece(place, cast, itemsize))


def _cast(weights: Sequence[Weight]) -> Cast | None:
    kinds = {(weight.original.dtype, weight.dtype) for weight in weights}
    if all(stored == wanted for stored, wanted in kinds):
        return None
    if len(kinds) > 1:
        names = ", ".join(weight.name for weight in weights[:_SHOWN])
        raise ConfigError(f"{names} share memory and cannot be cast together. Load in the stored dtype.")
    stored, wanted = next(iter(kinds))
    return Cast(stored, wanted)

"""What somebody else does to placed weights: a parameter or module put in their place is taken, all else is refused.

A parameter that is replaced stays where it was put, as on a plain module: it is used from then on, `remove()` leaves
it, and the promise of bytes does not cover it, which the report notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from penstock.bytesize import format_bytes
from penstock.errors import UsageError
from penstock.offload.tenants import Tenant
from penstock.offload.units import Partition, Weight, adapter_tensors

_MOVED = (
    "{name} was given other memory while penstock has it placed (by .data, or by to, half or parametrize on a module "
    "inside a component), and its unit's fills would not reach it. Call remove() on what penstock.apply returned, "
    "change the weights, and apply again."
)
_TWICE = (
    "{name} is used in another place as well since penstock has placed it, and other weights take its memory at times. "
    "Call remove() on what penstock.apply returned, tie or parametrize the weights, and apply again."
)


class Placements:
    """Which tensors stand for which weights, and where.

    Args:
        tenants: units whose stand-ins were made.
    """

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._weights: dict[int, tuple[torch.Tensor, list[Weight]]] = {}  # a tensor that is kept keeps its id
        for tenant in tenants:
            for weight, cold, live in zip(tenant.unit.weights, tenant.cold, tenant.live, strict=False):
                for tensor in (cold, live):
                    self._weights.setdefault(id(tensor), (tensor, []))[1].append(weight)

    def weight_of(self, tensor: Any) -> Weight | None:
        """The weight that a tensor stands for."""
        found = self._weights.get(id(tensor))
        return found[1][0] if found is not None else None

    def elsewhere(self, modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Weight]]:
        """Where stand-ins are used, in modules and inside them, and no weight was found when they were placed.

        Yields:
            The table of a module, the key in it, and the weight.
        """
        for inner in {id(inner): inner for module in modules for inner in module.modules()}.values():
            for table in (inner._parameters, inner._buffers):
                for key, tensor in table.items():
                    _, weights = self._weights.get(id(tensor), (None, []))
                    if weights and not any(weight.table is table and weight.key == key for weight in weights):
                        yield table, key, weights[0]


def require_untouched(tenants: Sequence[Tenant], module: nn.Module) -> None:
    """Refuse to run with weights whose memory somebody has exchanged, or which are used in a second place.

    Args:
        tenants: the units of a component.
        module: the component.

    Raises:
        UsageError: naming the weight.

    Cost: a look at each weight; one at each of the component's modules where a weight was replaced.
    """
    is_replaced = False
    for tenant in tenants:
        for weight, cold, live, address in zip(
            tenant.unit.weights, tenant.cold, tenant.live, tenant.addresses, strict=True
        ):
            if live.data_ptr() != address:
                raise UsageError(_MOVED.format(name=weight.name))
            current = weight.table.get(weight.key)
            is_replaced = is_replaced or not (current is live or current is cold)
    if is_replaced:
        for _, _, weight in Placements(tenants).elsewhere([module]):
            raise UsageError(_TWICE.format(name=weight.name))


class Inventory:
    """What components consist of when they are placed.

    Args:
        partition: their weights; the stand-ins are in place.
        tenants: the units.
    """

    def __init__(self, partition: Partition, tenants: Sequence[Tenant]) -> None:
        self._partition = partition
        self._placed = Placements(tenants)
        self._known = {id(found): found for part in partition.components for found in part.module.parameters()}

    def notes(self) -> tuple[str, ...]:
        """What was put in the place of weights since: how many bytes the promise does not cover.

        Cost: a look at each parameter.
        """
        notes = []
        for part in self._partition.components:
            known = {*self._known, *adapter_tensors([part.module])}
            parameters = [found for found in part.module.parameters() if self._placed.weight_of(found) is None]
            theirs = [found for found in parameters if id(found) not in known]
            if theirs:
                num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in theirs)
                notes.append(
                    f"{part.name}: {len(theirs)} weights ({format_bytes(num_bytes)}) were put in the place of others "
                    "since it was placed; they stay where they were put, and the promise does not cover them"
                )
        return tuple(notes)

"""What somebody else does to placed weights: a parameter or module put in their place is taken, all else is refused.

A parameter that is replaced stays where it was put, as on a plain module: it is used from then on, `remove()` leaves
it, and the promise of bytes does not cover it, which the report notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from penstock.bytesize import format_bytes
from penstock.errors import UsageError
from penstock.offload.cold import ColdTensor
from penstock.offload.tenants import Placements, Tenant
from penstock.offload.units import Partition, adapter_tensors

_MOVED = (
    "{name} was given other memory while penstock has it placed (by .data, or by to, half or parametrize on a module "
    "inside a component), and its unit's fills would not reach it. Call remove() on what penstock.apply returned, "
    "change the weights, and apply again."
)
_TWICE = (
    "{name} is used in another place as well since penstock has placed it, and other weights take its memory at times. "
    "Call remove() on what penstock.apply returned, tie or parametrize the weights, and apply again."
)


def require_untouched(tenants: Sequence[Tenant]) -> None:
    """Refuse to run with weights whose memory somebody has exchanged.

    Args:
        tenants: the units of a component.

    Raises:
        UsageError: naming the weight.

    Cost: a look at each weight.
    """
    for tenant in tenants:
        for number, (live, address) in enumerate(zip(tenant.live, tenant.addresses, strict=True)):
            if live.data_ptr() != address:
                raise UsageError(_MOVED.format(name=tenant.unit.weights[number].name))


def require_one_place(placements: Placements, module: nn.Module, arena: torch.Tensor) -> None:
    """Refuse to run with a weight that somebody has put into a second place since it was placed.

    Args:
        placements: of all units of a pipeline.
        module: a component.
        arena: the units' memory.

    Raises:
        UsageError: naming the weight.

    Cost: a look at each module inside the component.
    """
    for _, _, weight in placements.elsewhere([module]):
        raise UsageError(_TWICE.format(name=weight.name))
    for name in strays(placements, module, arena):
        raise UsageError(_TWICE.format(name=f"the memory of {type(module).__name__}.{name}"))


def strays(placements: Placements, module: nn.Module, arena: torch.Tensor) -> Iterator[str]:
    """The parameters that somebody has made of the memory of placed weights, as `weight_norm` does.

    Args:
        placements: of all units of a pipeline.
        module: a component.
        arena: the units' memory.

    Yields:
        Their names.
    """
    place = arena.untyped_storage().data_ptr()
    for name, found in module.named_parameters():
        if placements.weight_of(found) is None and (
            isinstance(found, ColdTensor)
            or (type(found) is nn.Parameter and found.untyped_storage().data_ptr() == place)
        ):
            yield name


class Inventory:
    """What components consist of when they are placed.

    Args:
        partition: their weights; the stand-ins are in place.
        placements: of all units.
    """

    def __init__(self, partition: Partition, placements: Placements) -> None:
        self._partition = partition
        self._placed = placements
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

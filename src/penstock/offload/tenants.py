"""A unit on the device: its place, its state, and what stands for its weights.

Owns the stand-ins and the views of a unit. Does not know when the unit comes or goes (`penstock.offload.residency`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from penstock.offload.cold import ColdTensor
from penstock.offload.likeness import made_like
from penstock.offload.transfer import Ticket
from penstock.offload.units import Unit, Weight
from penstock.plan import UnitPlan
from penstock.weights.layout import Layout
from penstock.weights.memory import Arena
from penstock.weights.sources import Source


class State(enum.Enum):
    """Where a unit's weights are."""

    COLD = "cold"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in use"


class Tenant:
    """A unit and its place in the arena; only `Residency` changes it.

    Attributes:
        num_left: how often it has left the device.
        cold: the stand-ins of its weights, in their order; tied ones have the same.
        live: the views of its place, likewise.
        addresses: of the views.
    """

    def __init__(self, unit: Unit, plan: UnitPlan, layout: Layout, source: Source) -> None:
        self.unit = unit
        self.plan = plan
        self.layout = layout
        self.source = source
        self.state = State.COLD
        self.ticket: Ticket | None = None
        self.rivals: tuple[Tenant, ...] = ()
        self.num_left = 0
        self.cold: list[ColdTensor] = []
        self.live: list[torch.Tensor] = []
        self.addresses: list[int] = []

    @property
    def name(self) -> str:
        """The unit's name."""
        return self.unit.name

    def make_live(self, arena: Arena) -> None:
        """Make the weights' views of the arena, once; their addresses never change."""
        memory = arena.tensor[self.plan.begin : self.plan.end]
        made: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for weight in self.unit.weights:
            if id(weight.original) not in made:
                with torch.inference_mode(False), torch.no_grad():
                    view = weight.view(memory, self.layout.positions[weight.piece])
                made[id(weight.original)] = made_like(weight.original, view)
            self.live.append(made[id(weight.original)])
        self.addresses = [live.data_ptr() for live in self.live]

    def make_cold(self, device: torch.device, fetch: Callable[[Tenant, int], torch.Tensor]) -> None:
        """Make the weights' stand-ins.

        Args:
            device: of the arena.
            fetch: brings a weight, by its number.
        """
        made: dict[int, ColdTensor] = {}
        for number, (weight, live) in enumerate(zip(self.unit.weights, self.live, strict=True)):
            if id(live) not in made:
                made[id(live)] = ColdTensor.of(
                    weight.original, device, weight.dtype, partial(fetch, self, number), self, live
                )
            self.cold.append(made[id(live)])

    def bind(self, is_live: bool) -> None:
        """Put the views, or the stand-ins, where the modules look; what somebody else put there is left alone."""
        for weight, cold, live in zip(self.unit.weights, self.cold, self.live, strict=True):
            current = weight.table.get(weight.key)
            if current is cold or current is live:
                weight.table[weight.key] = live if is_live else cold


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

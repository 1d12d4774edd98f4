"""A unit on the device: its place, its state, and what stands for its weights.

Owns the stand-ins and the views of a unit. Does not know when the unit comes or goes (`penstock.offload.residency`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial

import torch

from penstock.offload.cold import ColdTensor
from penstock.offload.likeness import made_like
from penstock.offload.transfer import Ticket
from penstock.offload.units import Unit
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

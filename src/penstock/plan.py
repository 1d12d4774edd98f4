"""Plan: where everything goes. For each unit its place on the device, whether it stays there, and the bytes promised.

Nouns only: filled by `penstock.planner`, carried out by `penstock.offload`. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from penstock.profile import Role

Offload = Literal["none", "sequential", "layerwise", "sharded"]
"""none: all weights stay on the device. sequential: components take turns. layerwise: blocks stream through slots.
sharded: each rank's device has a part of every block, and gathers blocks into slots."""

Residency = Literal["resident", "turn", "streamed"]
"""resident: keeps its place for good. turn: keeps it while its component runs; others may use it in between.
streamed: shares a slot with other blocks of its stack."""


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """A unit's place.

    Attributes:
        name: from the pipeline, such as `transformer.transformer_blocks.3`.
        component: that it belongs to; its own name for what stays in any case.
        num_bytes: on the device, gaps for alignment included.
        begin: byte of the device's arena at which it begins.
        residency: how long it stays.
        slot: number of the slot it streams through, or None.
    """

    name: str
    component: str
    num_bytes: int
    begin: int
    residency: Residency
    slot: int | None = None

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.begin + self.num_bytes

    def overlaps(self, other: UnitPlan) -> bool:
        """Whether both cannot be on the device at once."""
        return self.begin < other.end and other.begin < self.end


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """What a component needs on the device.

    Attributes:
        name: of the component.
        role: of the component.
        num_bytes: of all its weights.
        device_bytes: of the arena that it occupies while it runs.
        num_resident: its blocks that do not stream.
        num_streamed: its blocks that do.
        num_slots: through so many slots.
    """

    name: str
    role: Role
    num_bytes: int
    device_bytes: int
    num_resident: int = 0
    num_streamed: int = 0
    num_slots: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes.

    Attributes:
        offload: the mode.
        device: that the pipeline runs on.
        prefetch: how many blocks ahead are on their way.
        weight_bytes: of all weights, as they are on the device.
        arena_bytes: of the one allocation in which units take their places.
        fixed_bytes: of small buffers beside it.
        shard_bytes: of this rank's parts of units, at most, beside it; 0 where parts are not on the device.
        num_sharers: ranks that hold the weights together.
        budget_bytes: what was asked for, or None.
        least_bytes: the smallest budget that this mode and prefetch work with.
        components: in the order of the pipeline.
        units: in the order of their components.
        reason: why this mode, where it was chosen.
    """

    offload: Offload
    device: str
    prefetch: int
    weight_bytes: int
    arena_bytes: int
    fixed_bytes: int
    budget_bytes: int | None
    least_bytes: int
    components: tuple[ComponentPlan, ...]
    units: tuple[UnitPlan, ...]
    reason: str
    shard_bytes: int = 0
    num_sharers: int = 1

    @property
    def promised_bytes(self) -> int:
        """The most bytes of weights that will ever be on the device."""
        return self.arena_bytes + self.fixed_bytes + self.shard_bytes

    def to_json(self) -> str:
        """One line of JSON; `from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        components = tuple(ComponentPlan(**item) for item in raw.pop("components"))
        units = tuple(UnitPlan(**item) for item in raw.pop("units"))
        return cls(**raw, components=components, units=units)

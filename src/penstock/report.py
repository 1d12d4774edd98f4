"""Report: what was promised, and what was measured.

Nouns only; printable, and JSON. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from penstock.bytesize import format_bytes
from penstock.plan import Plan


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """One unit: its placement and where its bytes come from."""

    name: str
    num_bytes: int
    residency: str
    slot: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class ZeroStall:
    """How many blocks of a component would have to stay for compute never to wait, from what was measured.

    Attributes:
        component: its name.
        compute_s: of its blocks, on average.
        fill_s: of its streamed blocks, on average.
        num_blocks: that it has.
        num_resident: that should stay.
        budget_bytes: `max_weight_memory` that gives this many.
    """

    component: str
    compute_s: float
    fill_s: float
    num_blocks: int
    num_resident: int
    budget_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrafficReport:
    """What this rank exchanged along one axis of the mesh, by one operation.

    Attributes:
        axis: of the mesh, such as `ulysses`.
        operation: such as `all_to_all`.
        num_calls: so far.
        received_bytes: from other ranks, so far.
    """

    axis: str
    operation: str
    num_calls: int
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """The effective configuration of a placed pipeline, and its measures so far.

    Attributes:
        plan: what was decided, with the bytes promised.
        units: each unit's placement and source.
        notes: what the user should know.
        read_bytes: read from checkpoint files.
        cached_bytes: of these, read through the page cache although direct reads were wanted: the file system has none.
        unpinned_bytes: of host memory that CUDA refused to pin: copies from there do not run beside compute.
        moved_bytes: written to the device.
        saved_bytes: not moved, because calls of one step shared a block while it was there (`share_blocks`).
        written_bytes: written to disk; always 0.
        device_to_host_bytes: weights copied back from the device; always 0.
        peak_bytes: the most bytes of units that were on the device at once, with the buffers beside them.
        host_bytes: of weights in the host store.
        fill_s: seconds that readers and copies took.
        exposed_wait_s: seconds that compute stood still for weights.
        num_fills: units brought to the device.
        num_demanded: of these, not asked for ahead of use.
        num_prompt_hits: prompts answered without their encoders.
        zero_stall: residents needed for no wait, where there was time to measure.
        split: how the work is split over ranks, such as `cfg(2) * ulysses(2), tiles over 2 ranks`; empty on one rank.
        rank: of this process among them.
        traffic: what this rank exchanged with the others.
    """

    plan: Plan
    units: tuple[UnitReport, ...]
    notes: tuple[str, ...]
    read_bytes: int = 0
    cached_bytes: int = 0
    unpinned_bytes: int = 0
    moved_bytes: int = 0
    saved_bytes: int = 0
    written_bytes: int = 0
    device_to_host_bytes: int = 0
    peak_bytes: int = 0
    host_bytes: int = 0
    fill_s: float = 0.0
    exposed_wait_s: float = 0.0
    num_fills: int = 0
    num_demanded: int = 0
    num_prompt_hits: int = 0
    zero_stall: tuple[ZeroStall, ...] = ()
    split: str = ""
    rank: int = 0
    traffic: tuple[TrafficReport, ...] = ()

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def summary(self) -> dict[str, Any]:
        """What was measured and promised, without the list of units; JSON-able."""
        told = asdict(self)
        plan = told.pop("plan")
        del told["units"]
        kept = ("offload", "device", "prefetch", "weight_bytes", "least_bytes", "components", "reason")
        return {**{name: plan[name] for name in kept}, "promised_bytes": self.plan.promised_bytes, **told}

    def __str__(self) -> str:
        plan = self.plan
        lines = [
            f"offload {plan.offload} on {plan.device} ({plan.reason})",
            f"weights {format_bytes(plan.weight_bytes)}, promised at most {format_bytes(plan.promised_bytes)} on the "
            f"device, peak {format_bytes(self.peak_bytes)}; least possible {format_bytes(plan.least_bytes)}",
        ]
        for part in plan.components:
            blocks = f", {part.num_resident} blocks resident" if part.num_resident or part.num_streamed else ""
            streamed = f", {part.num_streamed} streamed through {part.num_slots} slots" if part.num_streamed else ""
            lines.append(
                f"  {part.name} ({part.role}): {format_bytes(part.num_bytes)}, {format_bytes(part.device_bytes)} on "
                f"the device while it runs{blocks}{streamed}"
            )
        if plan.num_sharers > 1:
            where = f"{format_bytes(plan.shard_bytes)} on the device" if plan.shard_bytes else "off the device"
            lines.append(f"sharded over {plan.num_sharers} ranks, this rank's part {where}")
        lines.append(
            f"read {format_bytes(self.read_bytes)}, moved {format_bytes(self.moved_bytes)} in {self.num_fills} fills "
            f"({self.num_demanded} on demand), {self.fill_s:.2f} s of filling, {self.exposed_wait_s:.2f} s waited for"
        )
        if self.cached_bytes:
            lines.append(f"  {format_bytes(self.cached_bytes)} of these went through the page cache, not directly")
        if self.unpinned_bytes:
            lines.append(f"  {format_bytes(self.unpinned_bytes)} of host memory could not be pinned: slower copies")
        if self.saved_bytes:
            lines.append(f"saved {format_bytes(self.saved_bytes)} of moves: calls of one step shared their blocks")
        if self.split:
            lines.append(f"split {self.split}, this is rank {self.rank}")
        lines.extend(
            f"  {item.axis}: {item.num_calls} {item.operation}, {format_bytes(item.received_bytes)} received"
            for item in self.traffic
        )
        for stall in self.zero_stall:
            lines.append(
                f"  {stall.component}: a block computes for {stall.compute_s * 1000:.1f} ms and fills in "
                f"{stall.fill_s * 1000:.1f} ms; with {stall.num_resident} of {stall.num_blocks} blocks resident "
                f"compute would not wait: max_weight_memory={stall.budget_bytes}"
            )
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

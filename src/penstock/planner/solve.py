"""Give every unit its place in an arena of so many bytes.

A component that runs occupies [rest | resident blocks | slots]. Components take turns, so that these ranges may
overlap between components: denoisers, which run at every step, grow from the arena's begin; the others are stacked
from its end down. What does not overlap stays for good; what does comes back when its component runs again.

Source: musubi-tuner and SGLang for residents spread evenly through a stack; measured again in docs/design-log.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.bytesize import format_bytes
from penstock.errors import ConfigError
from penstock.plan import ComponentPlan, Offload, Plan, Residency, UnitPlan
from penstock.profile import Role


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a component asks for, in bytes; blocks in the order in which they run.

    Attributes:
        rest: name and bytes of what is outside its blocks.
        blocks: name and bytes of each.
    """

    name: str
    role: Role
    rest: tuple[str, int] | None
    blocks: tuple[tuple[str, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.rest_bytes + sum(size for _, size in self.blocks)

    @property
    def rest_bytes(self) -> int:
        """Bytes outside of blocks."""
        return self.rest[1] if self.rest else 0


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a pipeline asks for.

    Attributes:
        offload: the mode for which it was taken apart.
        device: that it runs on.
        components: what takes turns.
        permanent: units that stay on the device in any case.
        fixed_bytes: outside of units.
        num_sharers: ranks that hold the weights together; units are multiples of it.
        alignment_bytes: units begin at multiples of this.
        reason: why this mode.
    """

    offload: Offload
    device: str
    alignment_bytes: int = 1
    num_sharers: int = 1
    components: tuple[Demand, ...]
    permanent: tuple[tuple[str, int], ...]
    fixed_bytes: int
    reason: str

    @property
    def permanent_bytes(self) -> int:
        """Bytes of the permanent units."""
        return sum(size for _, size in self.permanent)

    @property
    def shard_bytes(self) -> int:
        """What this rank's parts of the units that come and go take of the device, where they stay there."""
        if self.offload != "sharded":
            return 0
        return sum(demand.num_bytes for demand in self.components) // self.num_sharers

    @property
    def base_bytes(self) -> int:
        """What is on the device in any case."""
        return self.fixed_bytes + self.permanent_bytes + self.shard_bytes

    @property
    def num_bytes(self) -> int:
        """All weights."""
        return self.permanent_bytes + self.fixed_bytes + sum(demand.num_bytes for demand in self.components)


@dataclass(frozen=True)
class _Fit:
    """A component within a capacity: each unit's distance from the begin of the component's range."""

    demand: Demand
    num_bytes: int
    places: tuple[tuple[str, int, int, int | None], ...]  # name, bytes, begin, slot

    @property
    def num_slots(self) -> int:
        """How many slots its blocks stream through."""
        return len({slot for *_, slot in self.places if slot is not None})


def least_bytes(demands: Demands, prefetch: int) -> int:
    """The smallest budget with which a pipeline runs in its mode."""
    most = max((_least(demand, prefetch) for demand in demands.components), default=0)
    return demands.base_bytes + most


def solve(demands: Demands, budget_bytes: int | None, prefetch: int) -> Plan:
    """Place all units.

    Args:
        demands: what there is to place.
        budget_bytes: the most bytes of weights on the device; None takes the least possible.
        prefetch: blocks on their way beside the one that runs.

    Raises:
        ConfigError: for a budget below the least possible, naming the unit that sets it.
    """
    least = least_bytes(demands, prefetch)
    if budget_bytes is not None and budget_bytes < least:
        raise ConfigError(_too_small(demands, budget_bytes, least, prefetch))
    budget = least if budget_bytes is None else budget_bytes
    capacity = budget - demands.base_bytes
    capacity -= capacity % demands.alignment_bytes
    fits = [_fit(demand, capacity, prefetch) for demand in demands.components]
    begins, used = _arrange(fits, capacity)
    ranges = [(begin, begin + fit.num_bytes) for begin, fit in zip(begins, fits, strict=True)]
    units = []
    cursor = used
    for name, size in demands.permanent:
        units.append(UnitPlan(name=name, component=name, num_bytes=size, begin=cursor, residency="resident"))
        cursor += size
    for number, fit in enumerate(fits):
        others = [span for other, span in enumerate(ranges) if other != number]
        units.extend(_unit_plans(fit, begins[number], others))
    return Plan(
        offload=demands.offload,
        device=demands.device,
        prefetch=prefetch,
        weight_bytes=demands.num_bytes,
        arena_bytes=cursor,
        fixed_bytes=demands.fixed_bytes,
        budget_bytes=budget_bytes,
        least_bytes=least,
        components=tuple(_component_plan(fit) for fit in fits),
        units=tuple(units),
        reason=demands.reason,
        shard_bytes=demands.shard_bytes,
        num_sharers=demands.num_sharers,
    )


def spread(count: int, total: int) -> frozenset[int]:
    """`count` of `total` places, evenly apart, so that a transfer has the same time to hide behind each.

    The ends are left free: the last streamed block is followed by the first of the next step.
    """
    return frozenset((2 * number + 1) * total // (2 * count) for number in range(count))


def _least(demand: Demand, prefetch: int) -> int:
    slots = min(prefetch + 1, len(demand.blocks))
    return min(_layout(demand, frozenset(), slots).num_bytes, demand.num_bytes)


def _fit(demand: Demand, capacity: int, prefetch: int) -> _Fit:
    """As many resident blocks as there is room for, spread evenly; the streamed ones a multiple of the slots."""
    if demand.num_bytes <= capacity or not demand.blocks:
        return _layout(demand, frozenset(range(len(demand.blocks))), 0)
    total = len(demand.blocks)
    slots = min(prefetch + 1, total)
    best = _layout(demand, frozenset(), slots)
    for streamed in range(slots, total, slots):
        fit = _layout(demand, spread(total - streamed, total), slots)
        if fit.num_bytes <= capacity:
            return fit
    return best


def _layout(demand: Demand, resident: frozenset[int], num_slots: int) -> _Fit:
    places: list[tuple[str, int, int, int | None]] = []
    cursor = 0
    if demand.rest:
        places.append((*demand.rest, cursor, None))
        cursor += demand.rest[1]
    for number in sorted(resident):
        name, size = demand.blocks[number]
        places.append((name, size, cursor, None))
        cursor += size
    streamed = [block for number, block in enumerate(demand.blocks) if number not in resident]
    sizes = [max((size for _, size in streamed[slot::num_slots]), default=0) for slot in range(num_slots)]
    for number, (name, size) in enumerate(streamed):
        slot = number % num_slots
        places.append((name, size, cursor + sum(sizes[:slot]), slot))
    order = {name: number for number, (name, _) in enumerate(demand.blocks)}
    places.sort(key=lambda place: order.get(place[0], -1))
    return _Fit(demand, cursor + sum(sizes), tuple(places))


def _arrange(fits: Sequence[_Fit], capacity: int) -> tuple[list[int], int]:
    """Where each component's range begins, and how much of the arena is used.

    Denoisers lie at the begin, on top of each other unless all of them fit. The others are stacked from the end down
    while they fit beside the denoisers, the smallest first; what does not fit ends where the arena ends.
    """
    used = min(capacity, sum(fit.num_bytes for fit in fits))
    begins = [0] * len(fits)
    stepped = [number for number, fit in enumerate(fits) if fit.demand.role == "denoiser"]
    cursor = 0
    apart = sum(fits[number].num_bytes for number in stepped) <= used
    for number in stepped:
        begins[number] = cursor if apart else 0
        cursor = cursor + fits[number].num_bytes if apart else max(cursor, fits[number].num_bytes)
    end = used
    others = [number for number, fit in enumerate(fits) if number not in stepped]
    for number in sorted(others, key=lambda number: fits[number].num_bytes):
        size = fits[number].num_bytes
        if end - size >= cursor:
            end -= size
            begins[number] = end
        else:
            begins[number] = used - size
    return begins, used


def _unit_plans(fit: _Fit, begin: int, others: Iterable[tuple[int, int]]) -> Iterable[UnitPlan]:
    spans = list(others)
    for name, size, distance, slot in fit.places:
        first = begin + distance
        is_contested = any(first < end and low < first + size for low, end in spans)
        residency: Residency = "streamed" if slot is not None else "turn" if is_contested else "resident"
        yield UnitPlan(
            name=name, component=fit.demand.name, num_bytes=size, begin=first, residency=residency, slot=slot
        )


def _component_plan(fit: _Fit) -> ComponentPlan:
    streamed = sum(slot is not None for *_, slot in fit.places)
    return ComponentPlan(
        name=fit.demand.name,
        role=fit.demand.role,
        num_bytes=fit.demand.num_bytes,
        device_bytes=fit.num_bytes,
        num_resident=len(fit.demand.blocks) - streamed,
        num_streamed=streamed,
        num_slots=fit.num_slots,
    )


def _too_small(demands: Demands, budget: int, least: int, prefetch: int) -> str:
    base = demands.base_bytes - demands.shard_bytes
    parts = [f"{format_bytes(base)} that always stay"] if base else []
    if demands.shard_bytes:
        parts.append(f"{format_bytes(demands.shard_bytes)} of parts, 1/{demands.num_sharers} of each unit")
    worst = max(demands.components, key=lambda demand: _least(demand, prefetch), default=None)
    if worst is not None:
        parts.extend(_least_parts(worst, prefetch))
    advice = [f"--max-weight-memory {least}, or 'least'"]
    if demands.offload in ("sequential", "sharded"):
        advice.append("--offload layerwise")
    elif prefetch:
        fewer = least_bytes(demands, 0)
        if fewer < least:
            advice.append(f"--prefetch 0 with --max-weight-memory {fewer} or more")
    return (
        f"max_weight_memory={budget} bytes ({format_bytes(budget)}) is below the least that works, {least} bytes "
        f"({format_bytes(least)}) = {' + '.join(parts)}. Try {' or '.join(advice)}."
    )


def _least_parts(worst: Demand, prefetch: int) -> list[str]:
    """What the least of a component is made of, in words."""
    least = _least(worst, prefetch)
    if least == worst.num_bytes:
        return [f"{format_bytes(least)} of {worst.name} as a whole"]
    name, largest = max(worst.blocks, key=lambda block: block[1])
    slots = min(prefetch + 1, len(worst.blocks))
    return [
        f"{format_bytes(worst.rest_bytes)} of {worst.name} outside its blocks",
        f"{format_bytes(least - worst.rest_bytes)} in {slots} {'slot' if slots == 1 else 'slots'} for its blocks, "
        f"of which the largest, {name}, has {format_bytes(largest)}",
    ]


def budget_for(demands: Demands, name: str, num_resident: int, prefetch: int) -> int:
    """The budget with which at least so many blocks of a component stay on the device."""
    demand = next(demand for demand in demands.components if demand.name == name)
    total = len(demand.blocks)
    slots = min(prefetch + 1, total)
    streamed = (total - num_resident) // slots * slots
    resident = spread(total - streamed, total)
    needed = _layout(demand, resident, slots if streamed else 0).num_bytes
    return max(demands.base_bytes + needed, least_bytes(demands, prefetch))

"""The streamer of one pipeline: arena, sources, residency and hooks, put together from a plan.

Owns what `install` does and `remove` undoes. Does not know how a plan is found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from penstock.offload.changes import Inventory, strays
from penstock.offload.clock import StepClock
from penstock.offload.convoy import Convoy
from penstock.offload.cuda import CudaTransfer
from penstock.offload.gather import GatherTransfer
from penstock.offload.guards import guard
from penstock.offload.likeness import hand_over, made_like
from penstock.offload.released import is_in_memory, let_go
from penstock.offload.residency import Residency
from penstock.offload.stage import Stage
from penstock.offload.states import whole_states
from penstock.offload.tenants import State, Tenant
from penstock.offload.transfer import HostTransfer, Transfer
from penstock.offload.units import Partition, Unit
from penstock.plan import Plan
from penstock.timeline import Timeline
from penstock.undo import Undo
from penstock.weights.host import Common, HostStore, Progress
from penstock.weights.layout import Layout, packed, paged
from penstock.weights.memory import Arena
from penstock.weights.proof import Proof
from penstock.weights.ranges import ALIGNMENT_BYTES, PAGE_BYTES
from penstock.weights.reader import FileReader
from penstock.weights.shards import Cut, ShardSource, Sharers, cut, padded
from penstock.weights.sources import Source, source_of

_STRAY = (
    "{name} was made of the memory of a weight while penstock had it placed, and may hold another weight's values by "
    "now. Load the model again, and change it before it is placed."
)


def layout_of(unit: Unit, device: torch.device, num_sharers: int = 1) -> Layout:
    """How a unit lies on a device, so that as many ranks can hold equal parts of it."""
    if device.type == "cpu":
        return padded(paged(unit.pieces, num_sharers > 1), num_sharers, PAGE_BYTES)
    return padded(packed(unit.pieces), num_sharers, ALIGNMENT_BYTES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is not a matter of bytes.

    Attributes:
        is_direct: read files past the page cache.
        in_host_store: keep what streams in (pinned) host memory and read each file once.
        is_checked: hash every fill and poison what is given up.
        sharers: the ranks that hold the weights together; None where each has all of its own.
        common: memory for what other processes of this machine keep as well.
        on_read: told of what is read before the first run.
        shares_blocks: calls of one step are to share what streams; for whoever puts them off.
    """

    is_direct: bool = False
    in_host_store: bool = False
    is_checked: bool = False
    sharers: Sharers | None = None
    common: Common | None = None
    on_read: Progress | None = None
    shares_blocks: bool = False


def stored_units(partition: Partition, plan: Plan, settings: Settings) -> list[Unit]:
    """The units that are read beforehand, into memory (this rank's part of them): their originals are not needed."""
    residency = {unit.name: unit.residency for unit in plan.units}
    is_kept = settings.in_host_store or plan.offload == "sharded"
    return [
        unit
        for unit in partition.units
        if (settings.sharers is not None and is_in_memory(unit)) or (is_kept and residency[unit.name] != "resident")
    ]


def common_bytes(partition: Partition, plan: Plan, settings: Settings) -> int:
    """Bytes that each process of a machine with the same units would keep in host memory; 0 where these are its own."""
    units, device = stored_units(partition, plan, settings), torch.device(plan.device)
    stays_on_device = plan.offload == "sharded" and device.type != "cpu"
    if stays_on_device or any(is_in_memory(unit) for unit in units):
        return 0
    return sum(layout_of(unit, device, plan.num_sharers).num_bytes for unit in units) // plan.num_sharers


class Streamer:
    """Carries out a plan on a pipeline. Calls that are run together move each streamed block once.

    Args:
        pipeline: whose weights were taken apart.
        partition: its units.
        plan: their places.
        settings: the rest.
        timeline: where everything is noted, or None.

    Raises:
        ModelError: where the device has no room for the arena.
        WeightsError: for files that cannot be read.
    """

    def __init__(
        self, pipeline: Any, partition: Partition, plan: Plan, settings: Settings, timeline: Timeline | None = None
    ) -> None:
        self._pipeline = pipeline
        self._partition = partition
        self.plan = plan
        self.shares_blocks = settings.shares_blocks
        self.timeline = timeline
        device = torch.device(plan.device)
        self._settings = settings
        self.arena = Arena(plan.arena_bytes, device)
        self._proof = Proof(self.arena) if settings.is_checked else None
        if self._proof is not None:
            self.arena.poison(0, plan.arena_bytes)
        self.reader = FileReader(settings.is_direct)
        self.transfer: Transfer = _transfer(self.arena, timeline, settings.sharers)
        self.store: HostStore | None = None
        self.host_bytes = 0
        with ExitStack() as made:  # closed again where a source cannot be made
            made.callback(self.reader.close)
            made.callback(self.transfer.close)
            made.callback(lambda: self.store.close() if self.store is not None else None)
            tenants = self._tenants(partition, device)
            made.pop_all()
        self.residency = Residency(tenants, self.arena, self.transfer, self._proof, timeline)
        self.convoy = Convoy()
        self._stages = self._make_stages({id(tenant.unit): tenant for tenant in tenants})
        self._undo = Undo()
        self._inventory: Inventory | None = None

    def _tenants(self, partition: Partition, device: torch.device) -> list[Tenant]:
        sharers = self._settings.sharers
        num_sharers = sharers.size if sharers else 1
        plans = {unit.name: unit for unit in self.plan.units}
        layouts = {id(unit): layout_of(unit, device, num_sharers) for unit in partition.units}
        stored = {id(unit) for unit in stored_units(partition, self.plan, self._settings)}
        store = self._make_store(sum(layouts[number].num_bytes for number in stored) // num_sharers, device)
        tenants = []
        for unit in partition.units:
            layout = layouts[id(unit)]
            part = Cut(tuple(unit.pieces), layout)
            if sharers is not None:
                size = layout.num_bytes // num_sharers
                part = cut(unit.pieces, layout, sharers.rank * size, (sharers.rank + 1) * size)
            source: Source = source_of(part.pieces, part.layout, self.reader)
            if store is not None and id(unit) in stored:
                source = store.put(source, part.layout.num_bytes)
            if sharers is not None:
                source = ShardSource(source, sharers, layout.num_bytes)
            tenants.append(Tenant(unit, plans[unit.name], layout, source))
        if store is not None:
            store.finish(self._settings.on_read)
        return tenants

    def _make_store(self, num_bytes: int, device: torch.device) -> HostStore | None:
        if not num_bytes:
            return None
        place = device if self.plan.offload == "sharded" else torch.device("cpu")
        self.store = HostStore(num_bytes, device.type == "cuda", place, self._settings.common, device)
        if self.plan.offload != "sharded":
            self.host_bytes = num_bytes // self.store.num_sharers
        return self.store

    def _make_stages(self, tenants: Mapping[int, Tenant]) -> dict[str, Stage]:
        stages = {}
        for part in self._partition.components:
            clock = StepClock(self._pipeline) if part.role == "denoiser" else None
            units = [tenants[id(unit)] for unit in (*part.units, *self._shared_with(part.name))]
            if units:
                stages[part.name] = Stage(
                    part.module, units, self.residency, self.plan.prefetch, clock, self.timeline, self.convoy
                )
        return stages

    def _shared_with(self, component: str) -> list[Unit]:
        shared = self._partition.shared
        is_used = shared is not None and any(weight.name.startswith(f"{component}.") for weight in shared.weights)
        return [shared] if shared is not None and is_used else []

    def measured(self, component: str) -> tuple[float, float] | None:
        """Seconds that a block of a component computes, and that one fills, on average; None before it ran."""
        stage = self._stages.get(component)
        if stage is None or not stage.num_computed or not self.transfer.moved_bytes:
            return None
        fill_s = self.transfer.lane_s / self.transfer.moved_bytes * stage.block_bytes
        return stage.compute_s / stage.num_computed, fill_s

    @property
    def unpinned_bytes(self) -> int:
        """Bytes of host memory that CUDA refused to pin."""
        return self.transfer.unpinned_bytes + (self.store.unpinned_bytes if self.store is not None else 0)

    def check_fills(self) -> None:
        """See that what ranks gathered is what this one asked for, before anything made of it is given away.

        Raises:
            GenerationError: where it was another unit.

        Cost: on CUDA it waits for the gatherings that were begun.
        """
        if isinstance(self.transfer, GatherTransfer):
            self.transfer.check_fills(is_waiting=True)

    @property
    def streamed_denoisers(self) -> dict[str, torch.nn.Module]:
        """Denoisers that have blocks which stream, by name."""
        streamed = {part.name for part in self.plan.components if part.num_streamed}
        parts = self._partition.components
        return {part.name: part.module for part in parts if part.role == "denoiser" and part.name in streamed}

    @property
    def has_run(self) -> bool:
        """Whether a streamed block has run."""
        return any(stage.num_computed for stage in self._stages.values())

    @property
    def saved_bytes(self) -> int:
        """Bytes that were not moved, because several calls ran a block while it was there."""
        return sum(stage.saved_bytes for stage in self._stages.values())

    def run_together(self, calls: Sequence[Callable[[], Any]], is_within: bool = False) -> list[Any]:
        """Make calls of a denoiser together (`Convoy.run`).

        Args:
            calls: without arguments.
            is_within: whether they are made within an operation of torch that needs a result. It may hold weights of
                another component, whose place the denoiser uses: these are brought back.
        """
        if not is_within:
            return self.convoy.run(calls)
        denoisers = [part for part in self._partition.components if part.role == "denoiser"]
        own = {id(unit) for part in denoisers for unit in part.units}
        others = [tenant for tenant in self.tenants if id(tenant.unit) not in own]
        found = [(tenant, tenant.state) for tenant in others if tenant.state in (State.READY, State.IN_USE)]
        outputs = self.convoy.run(calls)
        for tenant, state in found:
            bring = self.residency.use if state is State.IN_USE else self.residency.ready
            bring(tenant)
        return outputs

    def announce(self, component: str) -> None:
        """A call of a component was put off, to be made by the convoy: it is one of the step that runs now."""
        self._stages[component].announce()

    def notes(self) -> tuple[str, ...]:
        """What others have put in the place of weights since they were placed."""
        return self._inventory.notes() if self._inventory is not None else ()

    def settle(self) -> bool:
        """Put the weights where the modules look (`Residency.settle`); whether somebody changed one in place."""
        return self.residency.settle()

    @property
    def num_fills(self) -> int:
        """Fills so far."""
        return self.residency.num_fills

    def last_fills(self) -> list[int]:
        """The numbers of the units that were filled last, the oldest first."""
        numbers = {id(tenant): number for number, tenant in enumerate(self.tenants)}
        return [numbers[id(tenant)] for tenant in self.residency.last_filled]

    def catch_up(self, missing: Sequence[int]) -> None:
        """Come to where the farthest of the ranks is that hold the weights together; all of them do it at once.

        Nothing is on the device then, and what runs have taught is forgotten: the same on every rank.

        Args:
            missing: the numbers of the units that others have asked for, and this rank has not.

        Cost: a fill of each; afterwards all weights come anew.
        """
        self.residency.catch_up([self.tenants[number] for number in missing])
        for stage in self._stages.values():
            stage.forget()

    @property
    def tenants(self) -> Sequence[Tenant]:
        """All units with their places and states."""
        return self.residency.tenants

    def install(self) -> None:
        """Put stand-ins, hooks and guards in place, all or none of them; no weights move yet."""
        is_whole = False
        try:
            self._install()
            is_whole = True
        finally:
            if not is_whole:
                self.remove()

    def _install(self) -> None:
        if self.store is not None:
            self._undo.add(self.store.close)  # after the copies from it are over
        self._undo.add(self.reader.close)
        self._undo.add(self.transfer.close)
        self._undo.add(self._restore)
        self.residency.install()
        _move_fixed(self._partition, self.arena.tensor.device, self._undo)
        for stage in self._stages.values():
            self._undo.add(stage.remove)
            stage.install()
        modules = [part.module for part in self._partition.components]
        self._inventory = Inventory(self._partition, self.residency.placements)
        self._undo.add(whole_states(self._partition, self.residency.placements.weight_of))
        self._undo.add(guard(self._pipeline, modules, self.arena.tensor.device))
        if self._settings.sharers is not None:
            let_go(self.residency, self._undo, self._proof)

    def _restore(self) -> None:
        """Put the weights back as they were found, also where somebody else uses them."""
        modules = [part.module for part in self._partition.components]
        others = list(self.residency.placements.elsewhere(modules))
        for module in modules:
            for name in strays(self.residency.placements, module, self.arena.tensor):
                warnings.warn(_STRAY.format(name=f"{type(module).__name__}.{name}"), UserWarning, stacklevel=2)
        self.residency.remove()
        for table, key, weight in others:
            table[key] = self.residency.restored(weight)

    def remove(self) -> None:
        """Undo `install`, in the opposite order; the pipeline is as it was."""
        self._undo.run()


def _transfer(arena: Arena, timeline: Timeline | None, sharers: Sharers | None) -> Transfer:
    is_cuda = arena.tensor.device.type == "cuda"
    own = CudaTransfer(arena, timeline) if is_cuda else HostTransfer(arena, timeline)
    return own if sharers is None else GatherTransfer(own, timeline)


def _move_fixed(partition: Partition, device: torch.device, undoing: Undo) -> None:
    """Bring what is outside of units to the device, tied tensors once."""
    moved: dict[int, torch.Tensor] = {}
    casts: dict[int, torch.Tensor] = {}

    def undo() -> None:
        for weight in partition.fixed:
            there = moved.get(id(weight.original), weight.original)
            if there is not weight.original and weight.table.get(weight.key) is there:
                restored = weight.restored(casts)
                hand_over(there, restored)
                weight.table[weight.key] = restored

    undoing.add(undo)
    for weight in partition.fixed:
        tensor = weight.original
        if tensor.device == device and weight.dtype == tensor.dtype:
            continue
        if id(tensor) not in moved:
            with torch.inference_mode(False), torch.no_grad():
                memory = tensor.detach().to(device=device, dtype=weight.dtype)
            moved[id(tensor)] = made_like(tensor, memory)
        weight.table[weight.key] = moved[id(tensor)]

"""Place a pipeline: decide where every weight goes, carry it out, report it, undo it.

Owns the way from a configuration to a plan, and what is placed at the moment. The streaming itself is
`penstock.offload`; the arithmetic is `penstock.planner`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from penstock.config import OffloadConfig, ParallelConfig, config_of
from penstock.distributed.mesh import Mesh
from penstock.engine.companions import notes_of_companions
from penstock.engine.neighbours import Neighbours
from penstock.engine.plans import Dtypes, Planned, plan_pipeline
from penstock.engine.ranks import agreed, join_ranks, require_alike, shared_machine, watched
from penstock.engine.settings import notes_of_plan, settings_of
from penstock.engine.sharing import Sharing
from penstock.engine.splits import check_splits, split_weights, split_work
from penstock.engine.stalls import zero_stalls
from penstock.engine.together import Meeting
from penstock.engine.traffic import counted, traffic_since
from penstock.errors import ConfigError, NotAPipelineError, PenstockError
from penstock.machine import Machine
from penstock.models.components import discover
from penstock.offload.prompts import PromptCache
from penstock.offload.streamer import Settings, Streamer, common_bytes
from penstock.offload.units import Locate
from penstock.report import Report, UnitReport
from penstock.timeline import Timeline
from penstock.undo import Undo
from penstock.weights.host import Progress
from penstock.weights.maps import MappedFiles
from penstock.weights.ranges import Range

_HANDLE = "_penstock_placed"  # the attribute of a pipeline that leads to what is placed on it
_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType[Placed]] = WeakKeyDictionary()  # by module


@dataclass(frozen=True)
class _Split:
    """How a pipeline is split over ranks, and what takes it back.

    Attributes:
        mesh: of all ranks.
        dtypes: of the weights on the device; looked up after a split, which makes new weights.
        weights: puts back those of other ranks.
        work: takes hooks and wrappers away.
    """

    mesh: Mesh
    dtypes: Callable[[], Dtypes]
    weights: Undo
    work: Undo = field(default_factory=Undo)


class Placed:
    """A pipeline whose weights penstock has placed; a context manager that removes itself.

    Attributes:
        pipeline: the stock pipeline, to be called as ever.
        plan: where everything is.
        mesh: the ranks that it is split over; one rank where it is not.
        timeline: what happened when, where it was asked for.
    """

    def __init__(
        self,
        pipeline: Any,
        planned: Planned,
        split: _Split,
        streamer: Streamer | None,
        prompts: PromptCache,
        notes: tuple[str, ...],
    ) -> None:
        self.pipeline = pipeline
        self.plan = planned.plan
        self.mesh = split.mesh
        self._planned = planned
        self._split = split
        self._streamer = streamer
        self._prompts = prompts
        self._sharing = Sharing(pipeline, streamer, split.mesh)
        self._meeting = Meeting(split.mesh, streamer)
        self._notes = notes
        self._device_before = _device_of(pipeline)
        self._traffic_before = counted(split.mesh)
        self._last_report: Report | None = None
        self.timeline = streamer.timeline if streamer else None

    def install(self) -> None:
        """Do to the pipeline what was planned."""
        pipeline, device = self.pipeline, torch.device(self.plan.device)
        if self._streamer is not None or self.mesh["world"].size > 1:
            modules = [module for component in discover(pipeline).components for module in component.module.modules()]
            _OWNERS.update((module, ref(self)) for module in modules)
        if self._streamer is not None:
            self._streamer.install()
        else:
            _cast(pipeline, self._split.dtypes())
            if _device_of(pipeline) != device and hasattr(pipeline, "to"):
                pipeline.to(device)
        self._prompts.install()
        self._split.work.add(self._sharing.install().run)
        self._split.work.add(split_work(pipeline, self.mesh, self._meeting, self.tell).run)
        self._split.work.add(self._meeting.hold)  # first of all, when it is removed

    def tell(self, note: str) -> None:
        """Have the report tell the user something more."""
        self._notes = (*self._notes, note)

    def report(self) -> Report:
        """The effective configuration, and what was measured so far.

        Cost: nothing on the CPU; on CUDA it waits for the copies that were begun.
        """
        if self._last_report is not None:
            return self._last_report
        hits = self._prompts.num_hits
        streamer = self._streamer
        if streamer is None:
            return Report(plan=self.plan, units=(), notes=self._notes, num_prompt_hits=hits, **self._split_report())
        residency = streamer.residency
        units = tuple(
            UnitReport(
                name=tenant.name,
                num_bytes=tenant.plan.num_bytes,
                residency=tenant.plan.residency,
                slot=tenant.plan.slot,
                source=tenant.source.kind,
            )
            for tenant in streamer.tenants
        )
        return Report(
            plan=self.plan,
            units=units,
            notes=(*self._notes, *self._sharing.notes()),
            read_bytes=streamer.reader.read_bytes,
            moved_bytes=streamer.transfer.moved_bytes,
            saved_bytes=streamer.saved_bytes,
            peak_bytes=residency.peak_bytes + self.plan.fixed_bytes + self.plan.shard_bytes,
            host_bytes=streamer.host_bytes,
            fill_s=streamer.transfer.busy_s,
            exposed_wait_s=residency.exposed_wait_s,
            num_fills=residency.num_fills,
            num_demanded=residency.num_demanded,
            num_prompt_hits=hits,
            zero_stall=zero_stalls(self._planned, streamer),
            **self._split_report(),
        )

    def _split_report(self) -> dict[str, Any]:
        """How the work is split, and what this rank exchanged with the others."""
        if self.mesh["world"].size == 1:
            return {}
        return {
            "split": self.mesh.config.description(),
            "rank": self.mesh["world"].rank,
            "traffic": traffic_since(self.mesh, self._traffic_before),
        }

    def remove(self) -> None:
        """Put the pipeline back as it was; a second call does nothing. All ranks do it together.

        Cost: nothing, where weights have their stored dtype; those that were cast on the way to the device are cast
        now, and take host memory.
        """
        if placed_on(self.pipeline) is not self:
            return
        with watched(self.mesh):
            self._remove()

    def _remove(self) -> None:
        self._split.work.run()
        self._prompts.remove()
        if self._streamer is not None:
            self._last_report = self.report()
            self._streamer.remove()
            self._streamer, self._sharing = None, Sharing(self.pipeline, None, self.mesh)  # and the device's memory
            self._meeting = Meeting(self.mesh)
        elif str(self._device_before) != self.plan.device:
            self.pipeline.to(self._device_before)
        self._split.weights.run()
        _cast(self.pipeline, self._split.dtypes())
        for module in [module for module, owner in _OWNERS.items() if owner() is self]:
            del _OWNERS[module]
        del vars(self.pipeline)[_HANDLE]  # last: interrupted before, remove() goes on where it was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply(pipeline: Any, *, parallel: ParallelConfig | None = None, trace: bool = False, **options: Any) -> Placed:
    """Place an existing pipeline, in place: its weights stream to the device as they are needed, its work is split.

    Weights that are still mapped from their checkpoint stream from there and need no host memory; what was cast,
    made or changed in memory stays there and streams from it.

    Args:
        pipeline: any diffusers pipeline on the CPU, or any object that holds modules; it is changed in place.
        parallel: how its work is split over ranks, which torchrun or another launcher has started; every rank calls
            `apply`, and later the pipeline, with the same arguments, and has a pipeline with equal weights.
        trace: keep a `Timeline` of fills, waits and compute.
        **options: fields of `OffloadConfig`: device, offload, max_weight_memory, prefetch, share_blocks, prompt_cache,
            check.

    Returns:
        What is placed: `.report()` tells about it, `.remove()` undoes it.

    Raises:
        ConfigError: for options that cannot work with this pipeline on this machine, before anything is changed.

    Cost: no weights are read, but a page of each where ranks are to share them; one allocation on the device.
    """
    return place(pipeline, config_of(OffloadConfig, **options), parallel, trace=trace)


def place(
    pipeline: Any,
    config: OffloadConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtypes: Callable[[], Dtypes] = dict,
    trace: bool = False,
    reason: str | None = None,
    on_read: Progress | None = None,
) -> Placed:
    """Place a pipeline as configured.

    Args:
        pipeline: on the CPU.
        config: what is asked for.
        parallel: how it is split over ranks; not at all where left out.
        dtypes: gives, by the tensor's id, the dtype wanted on the device; as it is where left out.
        trace: keep a timeline.
        reason: why this configuration, where it was chosen before.
        on_read: told of the bytes of weights that are read before the first run.

    Raises:
        ConfigError: for what cannot work.
    """
    if isinstance(pipeline, (nn.Module, type)) or not hasattr(pipeline, "__dict__"):
        raise NotAPipelineError(
            f"a {type(pipeline).__name__} is no pipeline. Give a diffusers pipeline, or an object that holds modules "
            "as attributes; penstock.load takes names and folders."
        )
    device, mesh = join_ranks(config, parallel, type(pipeline).__name__)
    with watched(mesh):
        agreed(mesh["world"], partial(_require_unplaced, pipeline))
        machine = shared_machine(device, mesh)
        split = agreed(mesh["world"], partial(_split, pipeline, mesh, dtypes))
        try:
            placed = _agreed(pipeline, config, split, machine, reason, on_read, Timeline() if trace else None)
        except (PenstockError, torch.OutOfMemoryError):
            split.weights.run()
            raise
        vars(pipeline)[_HANDLE] = placed  # first: what is interrupted can be removed
        is_whole = False
        try:
            agreed(mesh["world"], placed.install)
            is_whole = True
        finally:
            if not is_whole:
                placed.remove()
        return placed


def _split(pipeline: Any, mesh: Mesh, dtypes: Callable[[], Dtypes]) -> _Split:
    """Leave on this rank the weights that are its own."""
    check_splits(pipeline, mesh.config)
    return _Split(mesh, dtypes, split_weights(pipeline, mesh))


def _agreed(
    pipeline: Any,
    config: OffloadConfig,
    split: _Split,
    machine: Machine,
    reason: str | None,
    on_read: Progress | None,
    timeline: Timeline | None,
) -> Placed:
    """Plan, see that all ranks have the same plan, and allocate what was planned; nothing is changed yet.

    Where ranks exchange, no step is under way that may fail on one of them.
    """
    world, shard, twins = (split.mesh[axis] for axis in ("world", "shard", "twin"))
    neighbours = Neighbours(twins) if twins.size > 1 else None
    planned = agreed(world, partial(_planned, pipeline, config, split, machine, reason))
    num_neighbours = neighbours.least_size if neighbours is not None else 1
    settings = settings_of(planned, config, machine, shard, num_neighbours, on_read)
    require_alike(split.mesh, planned)
    num_bytes = common_bytes(planned.partition, planned.plan, settings)
    with neighbours.opened(num_bytes) if neighbours is not None else nullcontext() as common:
        settings = replace(settings, common=common)
        return agreed(world, partial(_made, pipeline, config, split, planned, settings, timeline))


def _planned(pipeline: Any, config: OffloadConfig, split: _Split, machine: Machine, reason: str | None) -> Planned:
    device, num_sharers = torch.device(machine.device), split.mesh["shard"].size
    planned = plan_pipeline(pipeline, config, device, _in_memory(), split.dtypes(), machine, num_sharers)
    return planned if reason is None else replace(planned, plan=replace(planned.plan, reason=reason))


def _made(
    pipeline: Any,
    config: OffloadConfig,
    split: _Split,
    planned: Planned,
    settings: Settings,
    timeline: Timeline | None,
) -> Placed:
    streamer = None
    if planned.plan.offload != "none":
        streamer = Streamer(pipeline, planned.partition, planned.plan, settings, timeline)
    prompts = PromptCache(pipeline, config.prompt_cache_bytes)
    notes = (*notes_of_plan(planned, config), *notes_of_companions(pipeline, split.mesh.config))
    return Placed(pipeline, planned, split, streamer, prompts, notes)


def _cast(pipeline: Any, dtypes: Dtypes) -> None:
    """Give weights the dtype that they are to have, where they have another."""
    for component in discover(pipeline).components:
        for tensor in (*component.module.parameters(), *component.module.buffers()):
            wanted = dtypes.get(id(tensor), tensor.dtype)
            if tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)


def placed_on(pipeline: Any) -> Placed | None:
    """What is placed on a pipeline now."""
    placed: Placed | None = vars(pipeline).get(_HANDLE)
    return placed


def _require_unplaced(pipeline: Any) -> None:
    placed = placed_on(pipeline)
    if placed is not None and placed.plan.offload == "none":
        placed.remove()  # nothing streams: as good as not placed
    elif placed is not None:
        raise ConfigError(
            f"this {type(pipeline).__name__} is placed already: {placed.plan.offload} with "
            f"{placed.plan.promised_bytes} bytes promised. Call remove() first."
        )
    for component in discover(pipeline).components:
        owners = (_OWNERS[module]() for module in component.module.modules() if module in _OWNERS)
        owner = next((owner for owner in owners if owner is not None), None)
        if owner is not None:
            raise ConfigError(
                f"{component.name} is placed already, as part of another {type(owner.pipeline).__name__}. Both may be "
                "used as they are; to place this one as well, call remove() on the other's handle first."
            )
        if any(hasattr(module, "_hf_hook") for module in component.module.modules()):
            raise ConfigError(
                f"{component.name} has hooks of accelerate (enable_model_cpu_offload, device_map). Two cannot move the "
                "same weights: call remove_all_hooks(), or build the pipeline without them."
            )


def _in_memory() -> Locate:
    """Finds weights of a loaded pipeline in the files that they are mapped from."""
    files = MappedFiles()

    def locate(name: str, tensor: torch.Tensor, num_bytes: int) -> Range | None:
        if tensor.device.type != "cpu":
            return None
        return files.locate(tensor.data_ptr(), num_bytes, tensor.dtype)

    return locate


def _device_of(pipeline: Any) -> torch.device:
    for component in discover(pipeline).components:
        for parameter in component.module.parameters():
            return parameter.device
    return torch.device("cpu")

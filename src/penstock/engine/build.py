"""The only composer: from a name and a configuration to a pipeline that is placed and ready.

    folder -> skeleton (no weights) -> checks, plan -> components, one after the other -> stock pipeline, placed

Owns the order in which these happen. Does not know requests or files of pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError

from penstock.config import LoadConfig, OffloadConfig, ParallelConfig
from penstock.distributed.mesh import Mesh
from penstock.engine.arguments import check_defaults
from penstock.engine.placed import place
from penstock.engine.placement import choose_dtype
from penstock.engine.plans import plan_pipeline
from penstock.engine.ranks import agreed, join_ranks, shared_machine, watched
from penstock.engine.splits import check_splits, split_weights
from penstock.errors import ModelError, WeightsError
from penstock.machine import Machine
from penstock.models.dtypes import load_stored, target_dtypes
from penstock.models.folder import ModelNotes, open_folder
from penstock.models.quiet import quiet_libraries
from penstock.models.skeleton import Skeleton, assemble, build_skeleton
from penstock.models.stored import as_stored
from penstock.plan import Plan
from penstock.weights.index import TensorRecord
from penstock.weights.ranges import FileRange, Range

_INTO_MEMORY = "into memory"
_NOTES: WeakKeyDictionary[Any, ModelNotes] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class LoadEvent:
    """A component is about to be loaded, or all are done.

    Attributes:
        component: its name; `into memory` while what streams from there (this rank's part of it) is read; empty once
            all are loaded.
        done_bytes: bytes of the components loaded so far, as their files hold them; or of what was read.
        total_bytes: of all components; or of what is to be read.
    """

    component: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Prepared:
    """A model that was found and checked, and whose weights are not loaded yet.

    Attributes:
        skeleton: the pipeline without weights.
        config: what was asked for.
        device: where the pipeline will run.
        dtype: of its weights, but for modules that a class keeps in float32.
        mesh: the ranks that its work is split over; one where it is not.
        plan: where the weights of this rank will go.
    """

    skeleton: Skeleton
    config: LoadConfig
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    plan: Plan

    @property
    def parallel(self) -> ParallelConfig:
        """How the work is split."""
        return self.mesh.config

    @property
    def has_split_weights(self) -> bool:
        """Whether a rank holds only some of the denoiser's weights."""
        return self.parallel.pipeline_parallel_size * self.parallel.tensor_parallel_size > 1

    @property
    def notes(self) -> ModelNotes:
        """What the model's maker says of it."""
        return self.skeleton.folder.notes


def load(
    model: str | Path,
    *,
    parallel: ParallelConfig | None = None,
    on_progress: Callable[[LoadEvent], None] | None = None,
    **options: Any,
) -> Any:
    """Load a pipeline: the stock diffusers class, its weights on the device.

    Args:
        model: `demo`, `demo-video`, a folder saved by diffusers, or a hub id.
        parallel: how its work is split over ranks, which torchrun or another launcher has started; every rank calls
            `load`, and later the pipeline, with the same arguments.
        on_progress: called before each component and once at the end.
        **options: fields of `LoadConfig`: device, dtype, offload, max_weight_memory, prefetch, variant, ...

    Returns:
        The pipeline. Where the model's maker names a picture size in `penstock.json`, it is the
        pipeline's own default size.

    Raises:
        UsageError: for what cannot work, before any weights are read.
        ModelError: for files that are missing, truncated or corrupt.

    Cost: each weight is read once; on a device other than the CPU the peak of host memory is one component.
    """
    prepared = prepare(model, LoadConfig.of(**options), parallel)
    with watched(prepared.mesh):
        return fill(prepared, on_progress)


def prepare(model: str | Path, config: LoadConfig, parallel: ParallelConfig | None = None) -> Prepared:
    """Find a model and check that this machine can load it, and these ranks can split it, as asked.

    Raises:
        UsageError: for what cannot work.
        ModelError: for files that are missing, truncated or corrupt.

    Cost: configs, tokenizers and safetensors headers are read; no weights.
    """
    device, mesh = join_ranks(config, parallel, Path(model).name)
    with watched(mesh):
        machine = shared_machine(device, mesh)
        return agreed(mesh["world"], partial(_prepared, model, config, device, mesh, machine))


def _prepared(model: str | Path, config: LoadConfig, device: torch.device, mesh: Mesh, machine: Machine) -> Prepared:
    """What this rank prepares, once its place is known."""
    dtype = choose_dtype(config, device)
    skeleton = build_skeleton(open_folder(model, config), config)
    check_defaults(skeleton.folder.notes.defaults, type(skeleton.pipeline))
    check_splits(skeleton.pipeline, mesh.config)
    plan = _plan(skeleton, config, dtype, mesh, machine)
    return Prepared(skeleton, config, device, dtype, mesh, plan)


def _plan(skeleton: Skeleton, config: LoadConfig, dtype: torch.dtype, mesh: Mesh, machine: Machine) -> Plan:
    """Plan with the bytes that the files' headers tell of, those of this rank."""
    records: dict[int, TensorRecord] = {}
    modules = [getattr(skeleton.pipeline, name) for name in skeleton.classes]
    for name, module in zip(skeleton.classes, modules, strict=True):
        records.update(as_stored(module, skeleton.indexes.get(name)))
    dtypes = _dtypes(modules, dtype)  # before what is split refuses to list its weights
    split = split_weights(skeleton.pipeline, mesh)

    def locate(name: str, tensor: torch.Tensor, num_bytes: int) -> Range | None:
        record = records.get(id(tensor))
        return FileRange(record.file, record.offset, num_bytes) if record else None

    try:
        device, num_sharers = torch.device(machine.device), mesh["shard"].size
        return plan_pipeline(skeleton.pipeline, config, device, locate, dtypes(), machine, num_sharers).plan
    finally:
        split.run()


def _dtypes(modules: Iterable[torch.nn.Module], dtype: torch.dtype) -> Callable[[], dict[int, torch.dtype]]:
    """What tells, by the id of a tensor that modules have then, the dtype that stock loading in `dtype` gives it."""
    wanted = [(module, target_dtypes(module, dtype)) for module in modules]

    def by_tensor() -> dict[int, torch.dtype]:
        return {
            id(tensor): names[name]
            for module, names in wanted
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor in named(remove_duplicate=False)
            if name in names
        }

    return by_tensor


def fill(prepared: Prepared, on_progress: Callable[[LoadEvent], None] | None = None, *, trace: bool = False) -> Any:
    """Load the weights of a prepared model and return the stock pipeline, placed as planned.

    Args:
        prepared: what `prepare` found.
        on_progress: called before each component and once at the end.
        trace: keep a timeline of what is streamed.

    Raises:
        WeightsError: for files that cannot be read, or that lack a weight.
        ModelError: where the weights do not fit on the device.
    """
    skeleton = prepared.skeleton
    report = on_progress or _ignore
    total_bytes = sum(map(skeleton.num_bytes, skeleton.classes))
    is_placed = prepared.plan.offload != "none"
    modules: dict[str, Any] = {}
    done_bytes = 0
    for name in skeleton.classes:
        report(LoadEvent(component=name, done_bytes=done_bytes, total_bytes=total_bytes))
        try:
            modules[name] = _load_component(prepared, name, as_stored=is_placed or prepared.has_split_weights)
            if not is_placed and not prepared.has_split_weights:
                modules[name].to(prepared.device)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{prepared.device} is full while {name} is loaded: {done_bytes} of {total_bytes} bytes of weights "
                "were there before. Use --offload layerwise, --dtype bfloat16, or --device cpu."
            ) from error
        done_bytes += skeleton.num_bytes(name)
    parts = {name: part for name, part in skeleton.pipeline.components.items() if name not in modules}
    pipeline = assemble(type(skeleton.pipeline), skeleton.folder, {**parts, **modules}, prepared.config)
    _set_default_size(pipeline, prepared.notes)
    _NOTES[pipeline] = prepared.notes
    for note in skeleton.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    _place(prepared, pipeline, modules, trace, report)
    report(LoadEvent(component="", done_bytes=done_bytes, total_bytes=done_bytes))
    return pipeline


def _place(
    prepared: Prepared, pipeline: Any, modules: dict[str, Any], trace: bool, report: Callable[[LoadEvent], None]
) -> None:
    """Place a loaded pipeline as its plan says, whatever has become of the machine's free memory since."""
    plan = prepared.plan
    budget = None if plan.budget_bytes is None else str(plan.budget_bytes)
    config = OffloadConfig(
        device=str(prepared.device),
        offload=plan.offload,
        max_weight_memory=budget if plan.offload != "none" else None,
        prefetch=plan.prefetch if plan.offload in ("layerwise", "sharded") else None,
        prompt_cache=prepared.config.prompt_cache,
        check=prepared.config.check and plan.offload != "none",
        share_blocks=prepared.config.share_blocks and plan.offload in ("layerwise", "sharded"),
    )
    is_stored = plan.offload != "none" or prepared.has_split_weights  # else the libraries have cast the weights
    dtypes = _dtypes(modules.values() if is_stored else (), prepared.dtype)
    parallel = prepared.parallel if prepared.parallel.world_size > 1 else None

    def on_read(done_bytes: int, total_bytes: int) -> None:
        report(LoadEvent(component=_INTO_MEMORY, done_bytes=done_bytes, total_bytes=total_bytes))

    placed = place(pipeline, config, parallel, dtypes=dtypes, trace=trace, reason=plan.reason, on_read=on_read)
    for name in ("check", "prefetch", "share_blocks"):
        if getattr(prepared.config, name) and not getattr(config, name):
            placed.tell(f"{name} has nothing to act on with offload={plan.offload} ({plan.reason})")


def notes_of(pipeline: Any) -> ModelNotes:
    """What the maker of a loaded pipeline says of it; nothing for a pipeline that came from elsewhere."""
    return _NOTES.get(pipeline, ModelNotes())


def _ignore(event: LoadEvent) -> None:
    """Report to nobody."""


def _load_component(prepared: Prepared, name: str, *, as_stored: bool) -> torch.nn.Module:
    """Load a component: as stock diffusers would, or without a cast, so that its weights stay in their files."""
    skeleton = prepared.skeleton
    path = skeleton.folder.component_path(name)
    variant = prepared.config.variant
    if not skeleton.has_variant(name, variant):
        variant = None  # this component has no such files: its plain ones, as diffusers does
    component_class = skeleton.classes[name]
    module: torch.nn.Module
    try:
        with quiet_libraries():
            if as_stored:
                module, info = load_stored(component_class, path, variant, prepared.dtype)
            else:
                module, info = component_class.from_pretrained(
                    path, dtype=prepared.dtype, variant=variant, output_loading_info=True
                )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{path}: {type(error).__name__}: {str(error).strip()} Save the model again.") from error
    missing = sorted(info["missing_keys"])
    if missing:  # the libraries only log this, and go on with random weights
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{path}: its files lack {missing[0]}{more}. Download or save the model again.")
    return module.eval()


def _set_default_size(pipeline: Any, notes: ModelNotes) -> None:
    """Let a bare `pipe(prompt)` make the size that the model was trained for."""
    size = notes.defaults.get("height")
    if size and size == notes.defaults.get("width") and hasattr(pipeline, "default_sample_size"):
        pipeline.default_sample_size = size // pipeline.vae_scale_factor

"""Which of a pipeline's denoisers are split over ranks, and which run whole beside them.

A denoiser is split where it is known how its class can be: by a row, or a plan. One of which nothing is known, as of a
ControlNet, runs whole on every rank, and what it makes is cut where it enters the denoiser that is split.

Owns this choice, and what is refused before weights load. Does not know how a split works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from penstock.bytesize import format_bytes
from penstock.config import ParallelConfig
from penstock.distributed.sequence.knowledge import check_sequences, entries_between_blocks, knows_sequences
from penstock.distributed.stages import check_stages, deal, knows_stages
from penstock.distributed.tensor import check_tensor
from penstock.errors import ConfigError
from penstock.models.components import Component, discover
from penstock.models.rows.table import row_of, strange_arguments
from penstock.models.rows.tensor import tensor_plan_of

Axis = Literal["sequence", "tensor", "pipeline"]
"""The axes of the mesh along which denoisers are split."""

AXES: tuple[Axis, ...] = get_args(Axis)
_KNOWS: Mapping[Axis, Callable[[nn.Module], bool]] = {
    "sequence": knows_sequences,
    "tensor": lambda denoiser: tensor_plan_of(denoiser) is not None,
    "pipeline": knows_stages,
}
_OFF: Mapping[Axis, str] = {
    "sequence": "ulysses_degree=1 and ring_degree=1",
    "tensor": "tensor_parallel_size=1",
    "pipeline": "pipeline_parallel_size=1",
}
_WHAT: Mapping[Axis, str] = {"sequence": "sequence", "tensor": "layers", "pipeline": "blocks"}
_CONTROLNETS = "diffusers.models.controlnets."


def denoisers_of(pipeline: Any) -> tuple[Component, ...]:
    """A pipeline's denoisers, those first that others only help (ControlNets are last)."""
    return tuple(sorted(discover(pipeline).by_role("denoiser"), key=lambda found: _is_controlnet(found.module)))


def is_split(denoiser: nn.Module, axis: Axis) -> bool:
    """Whether a denoiser is split along an axis, where its pipeline is."""
    return _KNOWS[axis](denoiser)


def check_denoisers(pipeline: Any, parallel: ParallelConfig) -> None:
    """Refuse denoisers that cannot be split, and others beside them whose results would not reach them.

    Args:
        pipeline: with weights, or on the meta device.
        parallel: the degrees.

    Raises:
        ConfigError: where none can be split, of the first; and where one that can does not say where results of
            another one enter it, or has weights in common with one.
    """
    denoisers = denoisers_of(pipeline)
    for axis, size in _sizes(parallel).items():
        split = [found for found in denoisers if is_split(found.module, axis)]
        whole = [found for found in denoisers if found not in split]
        for found in split or denoisers[:1]:
            _check(found.module, axis, parallel)
            for other in whole:
                _check_companion(found, other, axis, size)
        if axis == "sequence":
            _check_entries(split, whole)


def notes_of_companions(pipeline: Any, parallel: ParallelConfig) -> list[str]:
    """What the user should know of denoisers that are not split though others are."""
    notes = []
    denoisers = denoisers_of(pipeline)
    for found in denoisers:
        axes = [axis for axis in _sizes(parallel) if not is_split(found.module, axis)]
        if not axes:
            continue
        what = " and ".join(_WHAT[axis] for axis in axes)
        size = format_bytes(_num_bytes(found.module))
        note = (
            f"{found.name} ({type(found.module).__name__}, {size}) runs whole on every rank: nothing says how its "
            f"{what} can be split"
        )
        if "sequence" in axes:
            others = [other.name for other in denoisers if is_split(other.module, "sequence")]
            note += f"; what it makes is cut where it enters {' or '.join(others)}"
        notes.append(note)
    return notes


def _sizes(parallel: ParallelConfig) -> dict[Axis, int]:
    """Of the axes that split denoisers here."""
    sizes: dict[Axis, int] = {
        "sequence": parallel.sequence_size,
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
    }
    return {axis: size for axis, size in sizes.items() if size > 1}


def _check(denoiser: nn.Module, axis: Axis, parallel: ParallelConfig) -> None:
    if axis == "sequence":
        check_sequences(denoiser, parallel)
    elif axis == "tensor":
        check_tensor(denoiser, parallel.tensor_parallel_size)
    else:
        check_stages(denoiser, row_of(denoiser), parallel.pipeline_parallel_size)


def _check_companion(found: Component, other: Component, axis: Axis, size: int) -> None:
    """One that runs whole beside a denoiser that is split."""
    if axis == "sequence" and (strange := strange_arguments(found.module)):
        raise ConfigError(
            f"{other.name} ({type(other.module).__name__}) would run whole beside {found.name}, whose forward takes "
            f"{', '.join(strange)}: its row is for a class above {type(found.module).__name__} that has none, and "
            "does not say whether results of another model enter there, between blocks. Declare a row "
            f"(docs/concepts/sequence.md), or use {_OFF[axis]}."
        )
    if axis == "pipeline":
        held = {id(weight) for weight in other.module.parameters()}
        for path in (path for run in deal(found.module, row_of(found.module), size) for path in run):
            if any(id(weight) in held for weight in found.module.get_submodule(path).parameters()):
                raise ConfigError(
                    f"{other.name} ({type(other.module).__name__}) has weights in common with {path} of {found.name}, "
                    f"which one of {size} stages alone would hold. Use {_OFF[axis]}."
                )


def _check_entries(split: Sequence[Component], whole: Sequence[Component]) -> None:
    """A ControlNet's results enter between blocks: the denoiser has to say where."""
    controlnets = [found for found in whole if _is_controlnet(found.module)]
    if split and controlnets and not any(entries_between_blocks(found.module) for found in split):
        name, module, owner = controlnets[0].name, controlnets[0].module, type(split[0].module).__name__
        raise ConfigError(
            f"{name} ({type(module).__name__}) would run whole beside {split[0].name}, and nothing is known of where "
            f"its results enter {owner} between blocks: its row names no residuals (docs/concepts/sequence.md). "
            f"Use {_OFF['sequence']}, and split guidance (cfg_parallel_size) or weights instead."
        )


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _is_controlnet(module: nn.Module) -> bool:
    return any(base.__module__.startswith(_CONTROLNETS) for base in type(module).__mro__)

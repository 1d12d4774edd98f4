"""From a configuration to a plan: which mode, which budget, which place for every unit.

Owns the meaning of `auto` and of a budget that is left open, and what is refused with numbers before weights load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from penstock.bytesize import format_bytes
from penstock.config import LEAST, OffloadConfig
from penstock.errors import ConfigError
from penstock.machine import Machine, read_machine
from penstock.models.components import Component, discover
from penstock.offload.streamer import layout_of
from penstock.offload.units import Locate, Partition, Unit, take_apart
from penstock.plan import ComponentPlan, Offload, Plan
from penstock.planner.solve import Demand, Demands, least_bytes, solve
from penstock.weights.ranges import ALIGNMENT_BYTES, PAGE_BYTES

_DEVICE_SHARE = 0.8  # of a device's free memory for weights, where nobody says; the rest is for activations
_HOST_SHARE = 0.7  # the same of the host's, which the system and other programs need as well
_PREFETCH = 1
_STREAMED_TO = ("cpu", "cuda")

Dtypes = Mapping[int, torch.dtype]
"""By a tensor's id, the dtype that it is to have on the device."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from."""

    partition: Partition
    demands: Demands
    plan: Plan


def plan_pipeline(
    pipeline: Any,
    config: OffloadConfig,
    device: torch.device,
    locate: Locate,
    dtypes: Dtypes | None = None,
    machine: Machine | None = None,
    num_sharers: int = 1,
) -> Planned:
    """Decide where the weights of a pipeline go.

    Args:
        pipeline: with its weights, or on the meta device.
        config: what is asked for.
        device: that it will run on.
        locate: where a weight is stored.
        dtypes: by the tensor's id, the dtype wanted on the device; as it is where left out.
        machine: the memory there is; read now where left out.
        num_sharers: ranks that hold the weights together.

    Raises:
        ConfigError: for what cannot work, with numbers.
    """
    components = discover(pipeline).components
    if device.type not in _STREAMED_TO and config.offload not in ("auto", "none"):
        raise ConfigError(
            f"offload={config.offload!r}: penstock streams to {' and '.join(_STREAMED_TO)} devices, and {device} is "
            "none of them. Use offload='none', or --device cpu."
        )
    machine = machine or read_machine(str(device))
    weight_bytes = _weight_bytes(components, dtypes or {})
    budget = config.budget_bytes
    modes = _modes(pipeline, config, components, device)
    if num_sharers > 1:
        modes = ["sharded" if mode == "none" else mode for mode in modes if mode != "sequential" or mode == modes[0]]
    elif modes == ["sharded"]:
        raise ConfigError(
            "offload='sharded': one rank holds all weights, and has nobody to share them with. Give --use-hsdp and "
            "--hsdp-shard-size N, or --offload layerwise."
        )
    if config.offload == "auto" and config.max_weight_memory is None:
        budget = int(_share(device) * (machine.device_free_bytes or machine.host_free_bytes))
    if modes[0] == "none":
        if budget is None or weight_bytes <= budget:
            return _planned_none(config, components, device, dtypes or {}, machine)
        modes = modes[1:]
    if not modes:
        raise ConfigError(_unstreamable(pipeline, weight_bytes, budget))
    prefetch = _PREFETCH if config.prefetch is None else config.prefetch
    for mode in modes:
        partition = take_apart(components, locate, is_layerwise=mode != "sequential", dtypes=dtypes)
        demands = demands_of(partition, mode, device, _reason(config, mode, weight_bytes, budget), num_sharers)
        if mode == modes[-1] or budget is None or least_bytes(demands, prefetch) <= budget:
            break
    if mode == "sharded" and config.max_weight_memory is None:
        budget = None  # the least: gathered blocks stay only where somebody says how much they may take
    plan = solve(demands, budget, prefetch)
    _require_room(plan, machine)
    return Planned(partition, demands, plan)


def _modes(
    pipeline: Any, config: OffloadConfig, components: Sequence[Component], device: torch.device
) -> list[Offload]:
    """The modes to try, the one that needs most memory first."""
    has_denoiser = any(component.role == "denoiser" for component in components)
    if config.offload == "none":
        return ["none"]
    if config.offload != "auto":
        if not has_denoiser:
            raise ConfigError(
                f"offload={config.offload!r}: {type(pipeline).__name__} has no denoiser that could be found among "
                f"{', '.join(component.name for component in components) or 'its parts'}. Declare _dit_modules on its "
                "class, or use offload='none'."
            )
        return [config.offload]  # type: ignore[list-item]
    if not has_denoiser or device.type not in _STREAMED_TO:
        return ["none"]
    return ["layerwise"] if config.max_weight_memory == LEAST else ["none", "sequential", "layerwise"]


def _share(device: torch.device) -> float:
    return _HOST_SHARE if device.type == "cpu" else _DEVICE_SHARE


def _reason(config: OffloadConfig, mode: Offload, weight_bytes: int, budget: int | None) -> str:
    if config.offload != "auto":
        return "as asked for"
    if mode == "sharded":
        return "auto: shards fit on the devices"
    if budget is None:
        return "auto: the least memory"
    of = "asked for" if config.max_weight_memory else "free for weights"
    return f"auto: {format_bytes(weight_bytes)} of weights are more than {format_bytes(budget)} {of}"


def _weight_bytes(components: Sequence[Component], dtypes: Dtypes) -> int:
    """Bytes of all parameters and buffers on the device, tied ones once."""
    sizes: dict[int, int] = {}
    for component in components:
        for tensor in (*component.module.parameters(), *component.module.buffers()):
            sizes[id(tensor)] = tensor.numel() * dtypes.get(id(tensor), tensor.dtype).itemsize
    return sum(sizes.values())


def _planned_none(
    config: OffloadConfig, components: Sequence[Component], device: torch.device, dtypes: Dtypes, machine: Machine
) -> Planned:
    weight_bytes = _weight_bytes(components, dtypes)
    reason = "as asked for" if config.offload == "none" else "auto: all weights fit"
    if device.type != "cpu" and machine.device_bytes is not None and weight_bytes > machine.device_bytes:
        raise ConfigError(
            f"{format_bytes(weight_bytes)} of weights do not fit on {device}, which has "
            f"{format_bytes(machine.device_bytes)}. Use --offload layerwise (offload='layerwise'), or auto."
        )
    demands = Demands(
        offload="none", device=str(device), components=(), permanent=(), fixed_bytes=weight_bytes, reason=reason
    )
    parts = tuple(
        ComponentPlan(name=component.name, role=component.role, num_bytes=size, device_bytes=size)
        for component in components
        for size in (_weight_bytes([component], dtypes),)
    )
    plan = Plan(
        offload="none",
        device=str(device),
        prefetch=0,
        weight_bytes=weight_bytes,
        arena_bytes=0,
        fixed_bytes=weight_bytes,
        budget_bytes=config.budget_bytes,
        least_bytes=weight_bytes,
        components=parts,
        units=(),
        reason=reason,
    )
    return Planned(Partition([], None, []), demands, plan)


def demands_of(
    partition: Partition, mode: Offload, device: torch.device, reason: str = "", num_sharers: int = 1
) -> Demands:
    """What a partition asks of a device, in bytes.

    Args:
        partition: units of components for `sequential`, of blocks for `layerwise`.
        mode: which of these.
        device: whose layout counts.
        reason: why this mode.
        num_sharers: ranks that hold the weights together.
    """

    def size(unit: Unit) -> tuple[str, int]:
        return unit.name, layout_of(unit, device, num_sharers).num_bytes

    permanent = [unit for part in partition.components if part.role == "resident" for unit in part.units]
    if partition.shared is not None:
        permanent.append(partition.shared)
    return Demands(
        offload=mode,
        device=str(device),
        components=tuple(
            Demand(
                name=part.name,
                role=part.role,
                rest=size(part.rest) if part.rest else None,
                blocks=tuple(size(unit) for unit in part.blocks),
            )
            for part in partition.components
            if part.role != "resident"
        ),
        permanent=tuple(size(unit) for unit in permanent),
        fixed_bytes=partition.fixed_bytes,
        alignment_bytes=PAGE_BYTES if device.type == "cpu" else ALIGNMENT_BYTES,
        num_sharers=num_sharers,
        reason=reason,
    )


def _require_room(plan: Plan, machine: Machine) -> None:
    """Refuse a promise that the device cannot keep at all."""
    if machine.device_bytes is not None and plan.promised_bytes > machine.device_bytes:
        raise ConfigError(
            f"{format_bytes(plan.promised_bytes)} for weights are more than {plan.device} has, "
            f"{format_bytes(machine.device_bytes)} (limited by {machine.limited_by}). The least that "
            f"offload={plan.offload!r} works with is {plan.least_bytes} bytes ({format_bytes(plan.least_bytes)}). "
            + ("Try --offload layerwise." if plan.offload == "sequential" else "Try less --max-weight-memory.")
        )


def _unstreamable(pipeline: Any, weight_bytes: int, budget: int | None) -> str:
    return (
        f"{format_bytes(weight_bytes)} of weights are more than {format_bytes(budget or 0)}, and "
        f"{type(pipeline).__name__} has no denoiser that could be found, so that nothing can stream. Declare "
        "_dit_modules on its class, or use offload='none'."
    )

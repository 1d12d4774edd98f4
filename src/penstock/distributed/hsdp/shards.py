"""Sharded weights by torch's own means (FSDP2), on a model that is loaded: `apply_hsdp_to_model`.

Owns the wrapping: which device, which mesh, what is gathered as one, and by whom. Does not know why a module is a unit
(`units`), or why a weight stays whole (`weights`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from penstock.distributed import parallel_state
from penstock.distributed.environment import exchange_timeout
from penstock.distributed.group import Group, Work
from penstock.distributed.hsdp.config import HSDPInferenceConfig, ShardingError
from penstock.distributed.hsdp.order import Order
from penstock.distributed.hsdp.units import units_of
from penstock.distributed.hsdp.weights import cast_weights, move_whole, sort_weights
from penstock.distributed.whole import refuse_while_split
from penstock.undo import Undo

Model = TypeVar("Model", bound=nn.Module)

AXES = ("replicate", "shard")
_MESHES: dict[Any, DeviceMesh] = {}
_GROUPS: dict[Any, Group] = {}


def apply_hsdp_to_model(
    model: Model,
    hsdp_config: HSDPInferenceConfig,
    target_device: torch.device | str | None = None,
    *,
    prefetch: int = 1,
    repeats: bool = True,
) -> Model:
    """Leave on each rank its part of a loaded model's weights; every forward then gathers unit after unit.

    All ranks call it, with equal weights. There is no way back: load the model again. Load adapters before.

    Args:
        model: with its weights, on any device. A text encoder will do as well as a denoiser.
        hsdp_config: sizes and dtypes.
        target_device: where the shards go; left out, where the weights are.
        prefetch: units gathered ahead of the one that computes, each of which takes its bytes on every rank; 0 for
            none.
        repeats: whether forwards follow each other, as a denoiser's do: the last unit then asks for the first of the
            next forward, which stays gathered until then. Give False for what runs once per picture.

    Returns:
        The same object. All parameters are frozen.

    Raises:
        ShardingError: where sharding is off, the sizes do not multiply to the number of ranks, no unit is found, or
            the weights cannot be sharded (sharded already, on no device, moved by hooks, packed).
        DeclarationError: for a declaration that is not true of the class.

    Warns:
        UserWarning: where the groups have one rank: then nothing is exchanged, and nothing is gathered ahead.

    Cost: nothing is sent. On the target device at most one unit is whole at a time. In each forward one all-gather per
        unit, of (N - 1) / N of its bytes received.
    """
    is_running = dist.is_initialized()
    replicate, shard = hsdp_config.sizes(dist.get_world_size() if is_running else 1)
    if not is_running:
        raise ShardingError(
            "1 rank is running, and no process group: there is nobody to share weights with. Start N ranks: "
            "torchrun --nproc-per-node N your_script.py."
        )
    device = _device_of(model, target_device)
    mesh = shard_mesh(device.type, replicate, shard)
    shard_model(model, mesh, hsdp_config, prefetch=prefetch, repeats=repeats)
    parallel_state.set_shard_group(shard_group(mesh))
    return model


def shard_mesh(device_type: str, replicate: int, shard: int) -> DeviceMesh:
    """The mesh of all ranks, with neighbours in one shard group; made once.

    Cost: every rank must call it; torch makes one communicator per group.
    """
    _forget_ended_worlds()
    key = (dist.group.WORLD, device_type, replicate, shard)
    if key not in _MESHES:
        ranks = torch.arange(replicate * shard).view(replicate, shard)
        groups: Any = [_axis_group(ranks.T.tolist()), _axis_group(ranks.tolist())]
        _MESHES[key] = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=AXES)
    return _MESHES[key]


def _axis_group(rows: list[list[int]]) -> dist.ProcessGroup:
    """This rank's row; its group has the time-out that the ranks were started with."""
    if len(rows) == 1:
        return cast("dist.ProcessGroup", dist.group.WORLD)
    made = [dist.new_group(row, timeout=exchange_timeout()) for row in rows]
    return cast(
        "dist.ProcessGroup", next(group for row, group in zip(rows, made, strict=True) if dist.get_rank() in row)
    )


def shard_group(mesh: DeviceMesh) -> Group:
    """This rank's group along the axis `shard` of a mesh; its traffic is that of all models sharded over the mesh."""
    _forget_ended_worlds()
    key = (dist.group.WORLD, mesh)
    if key not in _GROUPS:
        line = mesh["shard"]
        _GROUPS[key] = Group("shard", line.get_local_rank(), tuple(line.mesh.tolist()), line.get_group())
    return _GROUPS[key]


def _forget_ended_worlds() -> None:
    for made in (_MESHES, _GROUPS):
        for key in [key for key in made if key[0] is not dist.group.WORLD]:
            del made[key]


def shard_model(
    model: nn.Module, mesh: DeviceMesh, config: HSDPInferenceConfig, *, prefetch: int = 1, repeats: bool = True
) -> int:
    """Shard a model over a mesh with the axes `replicate` and `shard`; the sizes of the config are not looked at.

    Args:
        model, prefetch, repeats: as for `apply_hsdp_to_model`.
        mesh: whose kind of device the shards go to (on CUDA the current one).
        config: dtypes, and whether weights are freed after use.

    Returns:
        The number of units, the root included: repeated blocks + 1.

    Raises:
        ShardingError, DeclarationError: as `apply_hsdp_to_model`; nothing was changed.
    """
    if type(prefetch) is not int or prefetch < 0:
        raise ShardingError(f"prefetch={prefetch!r} is not a whole number from 0 up. Try 1.")
    _require_plain(model)
    units = list({id(unit): unit for unit in units_of(model).values()}.values())
    sorting = sort_weights(model, units)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    move_whole(sorting, device)
    model.requires_grad_(False)
    cast_weights(model, sorting, config.param_dtype)
    group = shard_group(mesh)
    whole = {parameter for parameter, _ in sorting.whole.values()}
    del sorting  # it holds the weights that are about to be freed
    _wrap(model, units, mesh, whole, config)
    for module in (*units, model):
        cast(Any, module).set_custom_all_gather(Gather(group))
        _keep_name(module)
    Order(model, units, prefetch, repeats)
    refuse_while_split(model, f"over {group.size} ranks, each with a shard of every block", Undo())
    if group.size == 1:
        warnings.warn(
            f"{type(model).__name__} is sharded over groups of 1 rank: each holds all weights, and FSDP2 gathers "
            "nothing ahead. Use offload='layerwise' to hold less, or a larger hsdp_shard_size.",
            UserWarning,
            stacklevel=2,
        )
    return len(units) + 1


def _wrap(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    whole: set[nn.Parameter],
    config: HSDPInferenceConfig,
) -> None:
    """Shard the units, then what is left. Weights were cast before: the policy casts no weights and no inputs."""
    common: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "ignored_params": whole,
    }
    for unit in units:
        policy = MixedPrecisionPolicy(reduce_dtype=config.reduce_dtype, cast_forward_inputs=False)
        fully_shard(unit, mp_policy=policy, **common)
    policy = MixedPrecisionPolicy(
        reduce_dtype=config.reduce_dtype, output_dtype=config.output_dtype, cast_forward_inputs=False
    )
    fully_shard(model, mp_policy=policy, **common)


def _keep_name(module: nn.Module) -> None:
    """Give the class that FSDP2 made for a module the name of the class it stands for.

    By that name transformers finds which hidden states to collect, diffusers its parts, and penstock its rows.
    """
    made = type(module)
    own = next(kind for kind in made.__mro__[1:] if kind is not FSDPModule)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__


class Gather:
    """How a unit's shards become its whole weights: one all-gather, counted by the shard group."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the whole unit."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        """Begin to gather; on CUDA it is ordered by FSDP's streams, elsewhere by waiting for what is returned."""
        is_async = async_op or output_tensor.device.type == "cpu"
        return self.group.all_gather_into(output_tensor, input_tensor, is_async)


def _device_of(model: nn.Module, target: torch.device | str | None) -> torch.device:
    """Where shards go."""
    places = {tensor.device for tensor in model.parameters()}
    if torch.device("meta") in places:
        raise ShardingError(
            f"{type(model).__name__} has weights on the meta device: it is not loaded, and there is nothing to shard. "
            "Load it first."
        )
    if target is None and len(places) != 1:
        raise ShardingError(
            f"the weights of {type(model).__name__} are on {len(places)} devices ({', '.join(map(str, places))}). Say "
            "where the shards go: target_device."
        )
    device = torch.device(target) if target is not None else next(iter(places))
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return device
    raise ShardingError(
        f"target_device={device}, and cuda:{torch.cuda.current_device()} is this process's current device, which FSDP2 "
        f"gathers on. Call torch.cuda.set_device({device.index}) first."
    )


def _require_plain(model: nn.Module) -> None:
    """Refuse a model that is sharded, and one whose weights somebody else moves."""
    for name, module in model.named_modules():
        path = name or type(model).__name__
        if isinstance(module, FSDPModule):
            raise ShardingError(f"{path} is sharded already, over the ranks of a mesh. Load the model again.")
        if hasattr(module, "_hf_hook"):
            raise ShardingError(
                f"{path} carries a hook of accelerate (device_map, CPU offload), which moves its weights. Load the "
                "model without."
            )

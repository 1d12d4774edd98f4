"""One mesh of ranks: which group of ranks shares which part of the work.

    world = data * copies * cfg * pipeline * ring * ulysses * tensor, the last axis over neighbouring ranks

Owns the order of the axes and the groups along them. Does not know what is exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from penstock.config import ParallelConfig
from penstock.distributed.environment import exchange_timeout
from penstock.distributed.group import Group, Traffic
from penstock.errors import ConfigError

AXES = tuple(ParallelConfig().axes())
_JOINED = ("sequence", "vae", "shard", "replicate", "twin", "replica", "world")
_MESHES: dict[Any, Mesh] = {}


@dataclass(frozen=True)
class Mesh:
    """The groups that this rank belongs to.

    Attributes:
        config: the degrees.
        device_mesh: torch's, with those of `AXES` that are split; None in a single process without ranks.
        groups: by axis; besides these `sequence` (ring and ulysses together), `vae` (neighbouring ranks that share
            the tiles), `shard` (ranks that hold one copy of the weights together), `replicate` (ranks with the same
            shard), `twin` (those of all replicas), `replica` (all ranks that make one picture together) and `world`.
        device: that this rank exchanges from.
    """

    config: ParallelConfig
    device_mesh: DeviceMesh | None
    groups: Mapping[str, Group]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __getitem__(self, axis: str) -> Group:
        return self.groups[axis]

    def traffic(self) -> dict[str, Traffic]:
        """What this rank exchanged so far, by axis."""
        return {name: group.traffic for name, group in self.groups.items() if group.traffic.num_calls}


def build_mesh(config: ParallelConfig, device_type: str) -> Mesh:
    """The mesh of a configuration, over all ranks that were started; made once per configuration.

    Args:
        config: the degrees.
        device_type: `cuda` or `cpu`.

    Raises:
        ConfigError: where the degrees do not multiply to the number of ranks that were started.

    Cost: every rank must call it; torch makes one communicator per group of more than one rank, with the time-out that
        the ranks were started with.
    """
    require_ranks(config, num_running())
    if not dist.is_initialized():
        return alone()
    for world, *rest in [key for key in _MESHES if key[0] is not dist.group.WORLD]:
        del _MESHES[(world, *rest)]  # of a world that has ended
    key = (dist.group.WORLD, device_type, config)
    if key not in _MESHES:
        _MESHES[key] = _build(config, device_type)
    return _MESHES[key]


def alone() -> Mesh:
    """The mesh of one rank, with which nothing is exchanged."""
    return Mesh(ParallelConfig(), None, {name: Group(name, 0, (0,), None) for name in (*AXES, *_JOINED)})


def _build(config: ParallelConfig, device_type: str) -> Mesh:
    axes = config.axes()
    ranks = torch.arange(config.world_size).view(tuple(axes.values()))
    rank, groups = dist.get_rank(), {}
    lines = {axis: ranks.movedim(place, -1).reshape(-1, size) for place, (axis, size) in enumerate(axes.items())}
    rows = {
        **lines,
        "world": ranks.view(1, -1),
        "sequence": ranks.movedim(-1, 0).reshape(-1, config.sequence_size),
        "vae": ranks.view(-1, config.vae_patch_parallel_size),
        "replica": ranks.view(config.data_parallel_size, -1),
        **_shards(config, ranks),
    }
    made: _Made = {}
    for name, row in rows.items():
        own = tuple(next(line for line in row.tolist() if rank in line))
        groups[name] = Group(name, own.index(rank), own, _communicator(name, row.tolist(), rank, made))
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # which this rank has taken
    return Mesh(config, _device_mesh(config, device_type, groups), groups, device)


_Made = dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None]


def _communicator(name: str, rows: list[list[int]], rank: int, made: _Made) -> dist.ProcessGroup | None:
    """torch's group of this rank's row; all ranks make those of all rows. None for a rank that is alone in its row.

    Axes with the same rows share one. Shards have one of their own: they are gathered beside what others exchange.
    """
    key = tuple(map(tuple, rows))
    if len(rows[0]) == 1:
        return None
    if len(rows) == 1 and name != "shard":
        return _world()
    if key not in made or name == "shard":
        found = [(row, dist.new_group(row, timeout=exchange_timeout())) for row in rows]
        own: dist.ProcessGroup | None = next(group for row, group in found if rank in row)
        if name == "shard":
            return own
        made[key] = own
    return made[key]


def _world() -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.group.WORLD)


def _device_mesh(config: ParallelConfig, device_type: str, groups: Mapping[str, Group]) -> DeviceMesh:
    """torch's own view of the axes that are split, over the groups that are there."""
    split = {axis: size for axis, size in config.axes().items() if size > 1}
    if not split:
        return DeviceMesh.from_group(_world(), device_type, mesh_dim_names=("world",))
    ranks = torch.arange(config.world_size).view(tuple(split.values()))
    members: Any = [groups[axis].process_group for axis in split]
    return DeviceMesh.from_group(members, device_type, mesh=ranks, mesh_dim_names=tuple(split))


def _shards(config: ParallelConfig, ranks: torch.Tensor) -> dict[str, torch.Tensor]:
    """The groups that share, and that repeat, shards: within the ranks that have the same stage and the same slices."""
    order = [list(config.axes()).index(axis) for axis in ("data", "pipeline", "tensor")]
    holders = ranks.movedim(order, (0, 1, 2)).reshape(-1, config.num_holders)
    shards = holders.reshape(-1, config.shard_size)
    copies = config.num_holders // config.shard_size
    alike = holders.view(config.data_parallel_size, -1, copies, config.shard_size)
    return {
        "shard": shards,
        "replicate": alike.movedim(3, 2).reshape(-1, copies),
        "twin": alike.permute(1, 3, 0, 2).reshape(-1, config.data_parallel_size * copies),
    }


def num_running() -> int:
    """Ranks that have met: of torch's default group."""
    return int(dist.get_world_size()) if dist.is_initialized() else 1


def world_group() -> Group:
    """All ranks that have met, before any mesh of theirs."""
    return Group("world", dist.get_rank(), tuple(range(num_running())), dist.group.WORLD)


def require_ranks(config: ParallelConfig, world_size: int) -> None:
    """Whether the degrees multiply to the number of ranks.

    Raises:
        ConfigError: with the equation, and what to try.
    """
    wanted = config.world_size
    if wanted == world_size:
        return
    if world_size == 1:
        raise ConfigError(
            f"{config.equation()} = {wanted} ranks, and one is running. Start {wanted}: torchrun --nproc-per-node "
            f"{wanted} your_script.py; `penstock generate` and `penstock verify` start them by themselves."
        )
    advice = "smaller degrees" if world_size < wanted else "fewer ranks"
    if world_size % wanted == 0:
        advice = f"--data-parallel-size {config.data_parallel_size * world_size // wanted}"
    raise ConfigError(
        f"{config.equation()} = {wanted} is not world_size({world_size}). Every rank needs its part: try {advice}."
    )

"""How a plan is carried out on this machine: what is read past the page cache, what is kept in the host's memory.

Owns the shares of free memory at which that changes, and what a user is told about a plan. Does not know places.
"""

from __future__ import annotations

import torch

from penstock.config import OffloadConfig
from penstock.distributed.group import Group
from penstock.engine.plans import Planned
from penstock.machine import Machine
from penstock.offload.streamer import Settings
from penstock.weights.host import Progress
from penstock.weights.ranges import FileRange

_DIRECT_SHARE = 0.5  # of free host memory: files larger than this are read past the page cache
_STORE_SHARE = 0.6  # of free host memory that pinned weights may take


def settings_of(
    planned: Planned,
    config: OffloadConfig,
    machine: Machine,
    shard: Group,
    num_neighbours: int = 1,
    on_read: Progress | None = None,
) -> Settings:
    """How a plan is carried out.

    Args:
        planned: the plan, and what it was made from.
        config: what was asked for.
        machine: the memory that there is.
        shard: the ranks that hold the weights together; one where each has all of its own.
        num_neighbours: ranks of this machine (of any, at least) that would keep the same in host memory.
        on_read: told of what is read before the first run.
    """
    free, device = machine.host_free_bytes, torch.device(machine.device)
    moving = {unit.name for unit in planned.plan.units if unit.residency != "resident"}
    units = [unit for unit in planned.partition.units if unit.name in moving]
    in_files = sum(
        piece.range.num_bytes for unit in units for piece in unit.pieces if isinstance(piece.range, FileRange)
    )
    on_device = sum(piece.num_bytes for unit in units for piece in unit.pieces) // shard.size
    on_device //= num_neighbours
    return Settings(
        is_direct=in_files // shard.size > _DIRECT_SHARE * free,
        in_host_store=device.type == "cuda" and on_device <= _STORE_SHARE * free,
        is_checked=config.check,
        shares_blocks=config.share_blocks,
        sharers=shard if shard.size > 1 else None,
        on_read=on_read,
    )


def notes_of_plan(planned: Planned, config: OffloadConfig) -> list[str]:
    """What the user should know of a plan."""
    if planned.plan.offload == "none":
        return [
            f"{name} has nothing to act on: nothing streams ({planned.plan.reason})"
            for name in ("check", "prefetch", "share_blocks")
            if getattr(config, name)
        ]
    if planned.plan.device != "cpu" or planned.plan.num_sharers > 1:
        return []
    in_memory = sum(
        piece.range.num_bytes
        for unit in planned.partition.units
        for piece in unit.pieces
        if not isinstance(piece.range, FileRange)
    )
    if not in_memory:
        return []
    return [
        f"{in_memory} bytes of weights were cast, made or changed in memory: on the CPU, streaming these saves none"
    ]

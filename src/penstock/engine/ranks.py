"""Ranks that know the same and fail together: they meet, agree on what they have, and go on only if all can.

Owns what ranks decide together before a pipeline runs. Does not know how its work is split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from penstock.config import OffloadConfig, ParallelConfig
from penstock.distributed.environment import RankEnvironment, read_environment, start
from penstock.distributed.group import Group
from penstock.distributed.launcher import num_groups
from penstock.distributed.mesh import Mesh, alone, build_mesh, num_running, require_ranks, world_group
from penstock.distributed.signing import agree_on_secret
from penstock.distributed.watch import current_watch
from penstock.engine.placement import choose_device
from penstock.engine.plans import Planned
from penstock.engine.sharing import check_sharing
from penstock.errors import ConfigError, PenstockError
from penstock.machine import Machine, read_machine
from penstock.offload.released import is_in_memory
from penstock.offload.streamer import layout_of
from penstock.weights.proof import fingerprint

T = TypeVar("T")
_HEARD_BYTES = 1000


def join_ranks(config: OffloadConfig, parallel: ParallelConfig | None, model: str = "") -> tuple[torch.device, Mesh]:
    """This rank's device, and its place in the mesh.

    Args:
        config: names the device; ranks that ask for different things find that out here.
        parallel: the degrees; None for a process on its own, whatever started it.
        model: what is to be split, in words.

    Raises:
        ConfigError: for degrees that are not the ranks that were started, before they meet; for a device that a rank's
            machine has not, and where ranks ask for different things, on all of them.

    Cost: with several ranks it waits for all of them, and exchanges a few bytes.
    """
    check_sharing(config, parallel)
    environment = read_environment() if parallel else None
    if parallel is not None:
        parallel = parallel.for_ranks(environment.world_size if environment else num_running())
    if parallel is None or (environment is None and parallel.world_size == 1):
        return choose_device(config), alone()
    require_ranks(parallel, environment.world_size if environment else num_running())
    device = _met(config, environment)
    with _watched(tuple(range(parallel.world_size))):
        world = world_group()
        device = agreed(world, partial(_own_device, config, parallel, device))
        wish = replace(config, device=device.type)  # whose number is each rank's own
        _require_equal(world, f"{parallel} {wish} {model}", parallel)
        return device, build_mesh(parallel, device.type)


def _met(config: OffloadConfig, environment: RankEnvironment | None) -> torch.device | ConfigError:
    """Meet the others, and then have a device; or why this rank can have none, for it to say once all can hear it."""
    found: torch.device | ConfigError
    try:
        found = choose_device(config)
    except ConfigError as error:
        found = error
    if environment is not None:
        start(environment, found if isinstance(found, torch.device) else torch.device("cpu"))
    else:
        agree_on_secret()
    return found


def _own_device(config: OffloadConfig, parallel: ParallelConfig, found: torch.device | ConfigError) -> torch.device:
    """The device of this rank, once it has met the others.

    Raises:
        ConfigError: for one that it cannot exchange from, or that is not its own.
    """
    if isinstance(found, ConfigError):
        raise found
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"{parallel.equation()}: ranks exchange on cuda and cpu, and this is {found}. Use device=cpu."
        )
    if found.type == "cpu":
        return found
    own = torch.device("cuda", torch.cuda.current_device())
    if config.device not in ("auto", "cuda", str(own)):
        raise ConfigError(
            f"device={config.device!r} for a rank of {parallel.world_size} that runs on {own}: each needs a device of "
            "its own. Give cuda."
        )
    return own


def _require_equal(world: Group, wish: str, parallel: ParallelConfig) -> None:
    """Refuse ranks that were not asked for the same."""
    strange = _strangers(world, world.ranks, wish)
    if strange:
        raise ConfigError(
            f"rank {strange[0]} was asked for something else than rank 0 (this is rank {world.rank}: "
            f"{parallel.equation()}): another split, device, offload or model. Give every rank the same."
        )


def _strangers(world: Group, ranks: tuple[int, ...], words: str) -> list[int]:
    """Those of some ranks whose words are not those of the first; all ranks of the world call it.

    Cost: one small exchange.
    """
    digest = torch.frombuffer(bytearray(hashlib.blake2b(words.encode(), digest_size=8).digest()), dtype=torch.int64)
    digests = [int(item) for item in world.all_gather(digest)]
    return [rank for rank in ranks if digests[rank] != digests[ranks[0]]]


def shared_machine(device: torch.device, mesh: Mesh) -> Machine:
    """The memory that this rank may plan with: the least that any rank has, the host's divided among its ranks.

    All ranks get the same numbers, so that they decide the same.

    Cost: one small exchange.
    """
    machine = read_machine(str(device))
    world = mesh["world"]
    if world.size * num_groups() == 1:
        return machine
    environment = read_environment()
    num_sharing = (environment.local_world_size if environment else world.size) * num_groups()
    on_device = num_sharing if device.type == "cpu" else 1
    own = torch.tensor(
        [
            (machine.device_bytes or -1) // on_device,
            (machine.device_free_bytes or -1) // on_device,
            machine.host_bytes // num_sharing,
            machine.host_free_bytes // num_sharing,
        ]
    )
    device_bytes, device_free, host, host_free = torch.stack(world.all_gather(own)).amin(0).tolist()
    return replace(
        machine,
        device_bytes=device_bytes if device_bytes >= 0 else None,
        device_free_bytes=device_free if device_free >= 0 else None,
        host_bytes=host,
        host_free_bytes=host_free,
        limited_by=f"{machine.limited_by}, shared by {num_sharing} ranks",
    )


def require_alike(mesh: Mesh, planned: Planned) -> None:
    """Refuse to gather weights that the ranks have laid out differently, or that are others.

    Args:
        mesh: whose `shard` axis holds weights together.
        planned: tells where everything is, and comes from.

    Raises:
        ConfigError: on all ranks where some of those differ, as far as the first page of each weight tells.
        WeightsError: for files that cannot be read; the others then raise as well.

    Cost: where weights are sharded, three small exchanges, and 4 KiB read per weight on each rank.
    """
    shard, world = mesh["shard"], mesh["world"]
    if mesh.config.shard_size == 1:
        return
    contents = agreed(world, partial(_contents, planned))
    strange = _strangers(world, shard.ranks, _layouts(planned))
    others = _strangers(world, shard.ranks, contents)

    def refuse() -> None:
        if strange:
            raise ConfigError(
                f"rank {strange[0]} lays out its weights differently from rank {shard.ranks[0]}, and both are to hold "
                f"them together, hsdp_shard({shard.size}). Give all ranks the same files, options and versions."
            )
        if others:
            raise ConfigError(
                f"rank {others[0]} has other weights than rank {shard.ranks[0]}, of the same layout, and both are to "
                f"hold them together, hsdp_shard({shard.size}). Give all ranks the same files, and the same changes in "
                "memory."
            )

    agreed(world, refuse)


def _layouts(planned: Planned) -> str:
    """Where every byte of every unit is, which ranks that hold weights together must see alike."""
    plan, device = planned.plan, torch.device(planned.plan.device)
    places = [
        (
            unit.name,
            layout_of(unit, device, plan.num_sharers).positions,
            [(weight.name, str(weight.dtype), weight.piece, weight.offset) for weight in unit.weights],
            is_in_memory(unit),  # which decides when ranks gather it
        )
        for unit in planned.partition.units
    ]
    return f"{plan.to_json()} {places}"


def _contents(planned: Planned) -> str:
    """Of each unit a number that other weights would hardly have."""
    return str([fingerprint(unit.pieces) for unit in planned.partition.units])


def watched(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context in which no rank waits for one that has failed; does nothing on one rank."""
    return _watched(mesh["world"].ranks)


def _watched(ranks: tuple[int, ...]) -> AbstractContextManager[Any]:
    if len(ranks) == 1:
        return nullcontext()
    return current_watch(ranks) or nullcontext()


def agreed(world: Group, step: Callable[[], T]) -> T:
    """What a step returns, if it worked on every rank; else every rank raises.

    Args:
        world: all ranks; each takes the same step.
        step: what may fail on some of them.

    Raises:
        PenstockError: what the step raised here; or a ConfigError with what it raised on another rank.
        torch.OutOfMemoryError: where it was raised here.

    Cost: one small exchange; another where it failed.
    """
    if world.size == 1:
        return step()
    failure: PenstockError | torch.OutOfMemoryError | None = None
    result: list[T] = []
    try:
        result.append(step())
    except (PenstockError, torch.OutOfMemoryError) as error:
        failure = error
    flags = world.all_gather(torch.tensor([failure is not None]))
    failed = [rank for rank, flag in enumerate(flags) if flag]
    if failed:
        words = _heard(world, failed[0], str(failure or ""))
        if failure is not None:
            raise failure
        raise ConfigError(f"rank {failed[0]} of {world.size} cannot go on, and the others not without it: {words}")
    return result[0]


def _heard(world: Group, speaker: int, own: str) -> str:
    """What one rank says to all; cut where it is long."""
    told = torch.zeros(_HEARD_BYTES, dtype=torch.uint8)
    if world.rank == speaker:
        words = own.encode()[:_HEARD_BYTES]
        told[: len(words)] = torch.tensor(list(words), dtype=torch.uint8)
    return bytes(world.broadcast(told, speaker).tolist()).rstrip(b"\0").decode(errors="ignore")

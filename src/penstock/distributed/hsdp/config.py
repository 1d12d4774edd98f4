"""How weights are sharded: the sizes of the mesh, and the dtypes.

Owns the check that the sizes are those of the ranks that run. Does not know models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.errors import ConfigError

WHOLE_WORLD = -1


class ShardingError(ConfigError, ValueError):
    """Weights that cannot be sharded as asked for; a ValueError too, which code for other servers expects."""


@dataclass(frozen=True)
class HSDPInferenceConfig:
    """Weights in shards within a group of ranks, and copies of such groups.

    Neighbouring ranks shard. They must run the same forwards one for one: the ranks that share a sequence or guidance
    do, those that make pictures of their own do not.

    Attributes:
        enabled: whether weights are sharded at all.
        hsdp_replicate_size: number of groups that each hold all weights.
        hsdp_shard_size: ranks in a group, each with 1/N of every unit; -1 is the whole world.
        param_dtype: in which weights are held, gathered and used. Where most of a model has another dtype, weights of
            that dtype are cast once, when they are sharded. Never cast are: what the class keeps in float32, weights
            of a third dtype, integers, 8-bit floats, packed weights, ignored modules, and buffers. None casts nothing.
        reduce_dtype: of gradients; inference has none.
        output_dtype: to which floating tensors that the model's forward returns are cast; None leaves them.
        reshard_after_forward: whether a unit's whole weights are freed once it has run. False keeps what was gathered:
            from the second forward on nothing is exchanged, and each rank holds the whole model.

    Raises:
        ShardingError: for a size below 1, or a dtype that is not floating.
    """

    enabled: bool = False
    hsdp_replicate_size: int = 1
    hsdp_shard_size: int = WHOLE_WORLD
    param_dtype: torch.dtype | None = torch.bfloat16
    reduce_dtype: torch.dtype | None = torch.float32
    output_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        sizes = {"hsdp_replicate_size": self.hsdp_replicate_size, "hsdp_shard_size": self.hsdp_shard_size}
        for name, size in sizes.items():
            is_open = name == "hsdp_shard_size" and size == WHOLE_WORLD
            if not is_open and (type(size) is not int or size < 1):
                raise ShardingError(f"{name}={size!r} is not a whole number from 1 up. 1 is off.")
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ShardingError(f"{name}={dtype!r} is no floating dtype. Use torch.bfloat16, or None.")
        for name in ("enabled", "reshard_after_forward"):
            if not isinstance(getattr(self, name), bool):
                raise ShardingError(f"{name}={getattr(self, name)!r} is neither True nor False. Give one of them.")

    def sizes(self, world_size: int) -> tuple[int, int]:
        """How many groups there are, and how many ranks each has.

        Args:
            world_size: number of ranks that run.

        Raises:
            ShardingError: where sharding is off, and where the sizes do not multiply to the number of ranks.
        """
        if not self.enabled:
            raise ShardingError(
                "enabled=False: this config shards nothing, and the model would be left whole on each of "
                f"{world_size} ranks. Pass HSDPInferenceConfig(enabled=True, ...)."
            )
        replicate = self.hsdp_replicate_size
        shard = world_size if self.hsdp_shard_size == WHOLE_WORLD else self.hsdp_shard_size
        if replicate * shard != world_size:
            said = f"hsdp_replicate_size({replicate}) * hsdp_shard_size({shard}) = {replicate * shard}"
            advice = (
                f"hsdp_shard_size={world_size // replicate}"
                if world_size % replicate == 0
                else f"hsdp_replicate_size=1 and hsdp_shard_size={world_size}"
            )
            raise ShardingError(f"{said} is not world_size({world_size}). Every rank needs its part: try {advice}.")
        return replicate, shard

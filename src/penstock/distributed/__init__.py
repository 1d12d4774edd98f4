"""Splitting the work over ranks: sequence, tensor, guidance, pipeline and VAE parallelism; and sharding the weights.

The names below are those that a model's own code may use. They are resolved when they are first used: importing this
package imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.distributed.hsdp.config import HSDPInferenceConfig as HSDPInferenceConfig
    from penstock.distributed.hsdp.shards import apply_hsdp_to_model as apply_hsdp_to_model
    from penstock.distributed.hsdp.shards import shard_model as shard_model
    from penstock.distributed.parallel_state import get_fully_shard_world_size as get_fully_shard_world_size
    from penstock.distributed.sequence.config import SequenceParallelConfig as SequenceParallelConfig
    from penstock.distributed.sequence.plan import SequenceParallelInput as SequenceParallelInput
    from penstock.distributed.sequence.plan import SequenceParallelModelPlan as SequenceParallelModelPlan
    from penstock.distributed.sequence.plan import SequenceParallelOutput as SequenceParallelOutput
    from penstock.distributed.sequence.plan import SequenceParallelPartialInput as SequenceParallelPartialInput
    from penstock.distributed.sequence.plan import get_sp_plan_from_model as get_sp_plan_from_model
    from penstock.distributed.sequence.plan import validate_sp_plan as validate_sp_plan
    from penstock.distributed.sequence.sharding import ShardingValidator as ShardingValidator
    from penstock.distributed.sequence.sharding import get_sharding_validator as get_sharding_validator
    from penstock.distributed.sequence.sharding import sp_gather as sp_gather
    from penstock.distributed.sequence.sharding import sp_shard as sp_shard
    from penstock.distributed.sequence.sharding import sp_shard_with_padding as sp_shard_with_padding

_HOMES = {
    "HSDPInferenceConfig": "hsdp.config",
    "SequenceParallelConfig": "sequence.config",
    "SequenceParallelInput": "sequence.plan",
    "SequenceParallelModelPlan": "sequence.plan",
    "SequenceParallelOutput": "sequence.plan",
    "SequenceParallelPartialInput": "sequence.plan",
    "ShardingValidator": "sequence.sharding",
    "get_sharding_validator": "sequence.sharding",
    "apply_hsdp_to_model": "hsdp.shards",
    "get_fully_shard_world_size": "parallel_state",
    "get_sp_plan_from_model": "sequence.plan",
    "shard_model": "hsdp.shards",
    "sp_gather": "sequence.sharding",
    "sp_shard": "sequence.sharding",
    "sp_shard_with_padding": "sequence.sharding",
    "validate_sp_plan": "sequence.plan",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'penstock.distributed' has no attribute {name!r}")
    value = getattr(import_module(f"penstock.distributed.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

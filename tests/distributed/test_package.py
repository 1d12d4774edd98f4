"""What the package offers, and what importing it costs."""

from __future__ import annotations

import sys

import pytest

from penstock import distributed
from tests import processes

NAMES = {
    "HSDPInferenceConfig",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "ShardingValidator",
    "apply_hsdp_to_model",
    "get_fully_shard_world_size",
    "get_sharding_validator",
    "get_sp_plan_from_model",
    "shard_model",
    "sp_gather",
    "sp_shard",
    "sp_shard_with_padding",
    "validate_sp_plan",
}


def test_the_interface_is_complete() -> None:
    assert set(distributed.__all__) == NAMES == set(dir(distributed))
    for name in NAMES:
        assert getattr(distributed, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'penstock.distributed' has no attribute 'sp_shards'"):
        _ = distributed.sp_shards


def test_importing_it_is_light() -> None:
    code = "import sys, penstock.distributed; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The sizes of the mesh of shards, and what is refused before a model is looked at."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from penstock.distributed import HSDPInferenceConfig
from penstock.distributed.hsdp.config import ShardingError
from penstock.errors import ConfigError


def test_defaults_are_those_of_the_interface() -> None:
    config = HSDPInferenceConfig()
    assert (config.enabled, config.hsdp_replicate_size, config.hsdp_shard_size) == (False, 1, -1)
    assert (config.param_dtype, config.reduce_dtype, config.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert config.reshard_after_forward is True


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "sizes"),
    [(1, -1, 4, (1, 4)), (1, 4, 4, (1, 4)), (2, 2, 4, (2, 2)), (4, 1, 4, (4, 1)), (1, -1, 1, (1, 1))],
)
def test_sizes_multiply_to_the_number_of_ranks(replicate: int, shard: int, world: int, sizes: tuple[int, int]) -> None:
    config = HSDPInferenceConfig(enabled=True, hsdp_replicate_size=replicate, hsdp_shard_size=shard)
    assert config.sizes(world) == sizes


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "message"),
    [
        (2, 4, 4, "hsdp_replicate_size(2) * hsdp_shard_size(4) = 8 is not world_size(4)"),
        (2, 4, 4, "Every rank needs its part: try hsdp_shard_size=2."),
        (2, -1, 4, "hsdp_replicate_size(2) * hsdp_shard_size(4) = 8 is not world_size(4)"),
        (1, 2, 4, "= 2 is not world_size(4). Every rank needs its part: try hsdp_shard_size=4."),
        (3, 1, 4, "try hsdp_replicate_size=1 and hsdp_shard_size=4."),
    ],
)
def test_other_products_are_refused_with_the_numbers(replicate: int, shard: int, world: int, message: str) -> None:
    config = HSDPInferenceConfig(enabled=True, hsdp_replicate_size=replicate, hsdp_shard_size=shard)
    with pytest.raises(ShardingError, match=re.escape(message)):
        config.sizes(world)


def test_a_config_that_is_off_is_refused() -> None:
    with pytest.raises(ShardingError, match=r"enabled=False.*whole on each of 4 ranks"):
        HSDPInferenceConfig().sizes(4)


def test_errors_are_of_both_kinds() -> None:
    assert issubclass(ShardingError, ConfigError)
    assert issubclass(ShardingError, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hsdp_replicate_size", 0),
        ("hsdp_replicate_size", -1),
        ("hsdp_shard_size", 0),
        ("hsdp_shard_size", -2),
        ("hsdp_shard_size", 2.0),
        ("hsdp_replicate_size", True),
        ("param_dtype", torch.int8),
        ("output_dtype", "bfloat16"),
        ("enabled", 1),
        ("reshard_after_forward", 2),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ShardingError, match=f"{name}={re.escape(repr(value))}"):
        HSDPInferenceConfig(**{name: value})

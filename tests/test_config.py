"""Options: defaults, ranges, misspellings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from penstock.config import LoadConfig, ParallelConfig, SourceConfig
from penstock.errors import ConfigError


def test_defaults() -> None:
    assert LoadConfig() == LoadConfig(device="auto", dtype="auto", variant=None, revision=None)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_devices(device: str) -> None:
    assert LoadConfig(device=device).device == device


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"device": "cuda:x"}, {"dtype": "int8"}, {"dtype": ""}, {"device": 0}]
)
def test_values_out_of_range_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="Use auto"):
        LoadConfig(**options)


def test_misspelt_option_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'devise' \(did you mean 'device'\?\)"):
        LoadConfig.of(devise="cpu")
    with pytest.raises(ConfigError, match="unknown option 'device'"):
        SourceConfig.of(device="cpu")  # looking at a model has no device


def test_every_option_explains_itself() -> None:
    for item in dataclasses.fields(LoadConfig):
        assert item.metadata["help"].endswith(".")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadConfig().device = "cpu"


def test_torchs_own_names_are_understood() -> None:
    assert LoadConfig.of(dtype=torch.bfloat16, device=torch.device("cpu")) == LoadConfig(dtype="bfloat16", device="cpu")


@pytest.mark.parametrize("value", ["", 3])
def test_variant_is_a_name(value: object) -> None:
    with pytest.raises(ConfigError, match="variant=.* is no name"):
        LoadConfig(variant=value)


def test_degrees_multiply_to_the_ranks() -> None:
    config = ParallelConfig(cfg_parallel_size=2, ulysses_degree=2, ring_degree=3, data_parallel_size=2)
    assert config.world_size == 24
    assert config.sequence_size == 6
    assert config.equation() == "data(2) * cfg(2) * ring(3) * ulysses(2)"
    assert ParallelConfig().world_size == 1
    assert ParallelConfig().equation() == "nothing split (1)"


def test_tiles_alone_start_ranks_that_do_the_same_denoising() -> None:
    assert ParallelConfig(vae_patch_parallel_size=4).world_size == 4
    assert ParallelConfig(vae_patch_parallel_size=4, ulysses_degree=2).copies == 2
    assert ParallelConfig(vae_patch_parallel_size=2, ulysses_degree=4).copies == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_a_degree_is_a_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="ulysses_degree=.* is not a whole number from 1 up. 1 switches it off."):
        ParallelConfig(ulysses_degree=value)  # type: ignore[arg-type]


def test_tiles_that_fit_no_ranks_are_refused_with_the_equation() -> None:
    with pytest.raises(ConfigError, match=r"vae_patch_parallel_size\(4\) and .*ring\(6\) = 6 ranks.*size 2\."):
        ParallelConfig(vae_patch_parallel_size=4, ring_degree=6)


def test_every_degree_explains_itself() -> None:
    for item in dataclasses.fields(ParallelConfig):
        assert item.metadata["help"].endswith(".")


def test_shards_multiply_to_the_ranks_that_hold_the_same() -> None:
    assert ParallelConfig(use_hsdp=True, hsdp_shard_size=4).axes()["copies"] == 4
    assert ParallelConfig(use_hsdp=True, ulysses_degree=4).shard_size == 4
    two = ParallelConfig(use_hsdp=True, hsdp_shard_size=2, hsdp_replicate_size=2, ulysses_degree=2, cfg_parallel_size=2)
    assert (two.num_holders, two.world_size) == (4, 4)
    with_stages = ParallelConfig(use_hsdp=True, hsdp_shard_size=2, pipeline_parallel_size=2)
    assert (with_stages.num_holders, with_stages.world_size) == (2, 4)
    message = r"hsdp_replicate\(1\) \* hsdp_shard\(2\) = 2 is not .*ulysses\(4\) = 4.*--hsdp-replicate-size 2"
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(use_hsdp=True, hsdp_shard_size=2, ulysses_degree=4)
    with pytest.raises(ConfigError, match="--hsdp-replicate-size 1 and --hsdp-shard-size 2"):
        ParallelConfig(use_hsdp=True, hsdp_shard_size=3, ulysses_degree=2)
    with pytest.raises(ConfigError, match="no effect without use_hsdp"):
        ParallelConfig(hsdp_replicate_size=2)
    with pytest.raises(ConfigError, match="neither True nor False"):
        ParallelConfig(use_hsdp=1)  # type: ignore[arg-type]


def test_an_open_number_of_shards_takes_all_ranks() -> None:
    assert ParallelConfig(use_hsdp=True).for_ranks(4).shard_size == 4
    copies = ParallelConfig(use_hsdp=True, hsdp_replicate_size=2).for_ranks(4)
    assert (copies.shard_size, copies.world_size) == (2, 4)
    assert ParallelConfig(use_hsdp=True, data_parallel_size=2).for_ranks(4).shard_size == 2
    assert ParallelConfig(ulysses_degree=2).for_ranks(4).world_size == 2
    assert ParallelConfig(use_hsdp=True, hsdp_replicate_size=2).for_ranks(3).world_size == 1
    told = ParallelConfig(use_hsdp=True, hsdp_shard_size=2, vae_patch_parallel_size=2).description()
    assert told == "copies(2), VAE rows over 2 ranks, weights over 2 ranks"
    assert ParallelConfig().description() == ""


@pytest.mark.parametrize(
    ("degrees", "split"),
    [
        ({}, ""),
        ({"data_parallel_size": 2}, r" with data\(2\)"),
        ({"tensor_parallel_size": 2}, r" with tensor\(2\)"),
        ({"pipeline_parallel_size": 2}, r" with pipeline\(2\)"),
        ({"hsdp_replicate_size": 2}, r" with hsdp_replicate\(2\)"),
        ({"hsdp_replicate_size": 2, "ulysses_degree": 2}, r" with hsdp_replicate\(2\)"),
    ],
    ids=str,
)
def test_weights_that_would_be_sharded_over_one_rank_are_refused(degrees: dict[str, int], split: str) -> None:
    parallel = ParallelConfig(use_hsdp=True, **degrees)
    for num_ranks in {1, 2 if split else 1}:
        with pytest.raises(ConfigError, match=f"use_hsdp{split} on {num_ranks} ranks?: each rank has nobody to share"):
            parallel.for_ranks(num_ranks)
    assert parallel.for_ranks(4).shard_size == (2 if split else 4)
    with pytest.raises(ConfigError, match="each rank has nobody to share"):
        ParallelConfig(use_hsdp=True, hsdp_shard_size=1, **degrees)

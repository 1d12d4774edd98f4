"""Options: defaults, ranges, misspellings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from penstock.config import LoadConfig, SourceConfig
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

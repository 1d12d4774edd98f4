"""Devices and dtypes: what auto means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from penstock.config import LoadConfig
from penstock.engine.placement import available_devices, choose_device, choose_dtype
from penstock.errors import ConfigError

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


def test_cpu_is_always_there() -> None:
    assert available_devices()[-1] == "cpu"
    assert choose_device(LoadConfig(device="cpu")) == CPU
    assert str(choose_device(LoadConfig())) == available_devices()[0]


def test_missing_device_names_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="device='cuda:63' is not on this machine .*; it has .*cpu"):
        choose_device(LoadConfig(device="cuda:63"))


def test_dtype_on_the_cpu() -> None:
    assert choose_dtype(LoadConfig(), CPU) is torch.float32
    assert choose_dtype(LoadConfig(dtype="bf16"), CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="'float16' is not supported on the CPU.*--dtype float32"):
        choose_dtype(LoadConfig(dtype="fp16"), CPU)


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_on_gpus(has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    assert choose_dtype(LoadConfig(), CUDA) is expected
    assert choose_dtype(LoadConfig(dtype="fp16"), CUDA) is torch.float16
    if not has_bfloat16:
        with pytest.raises(ConfigError, match="Turing has no bfloat16 units"):
            choose_dtype(LoadConfig(dtype="bf16"), CUDA)


def test_mps_uses_bfloat16() -> None:
    assert choose_dtype(LoadConfig(), torch.device("mps")) is torch.bfloat16

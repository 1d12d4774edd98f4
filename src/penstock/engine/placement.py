"""Which device and which dtype a pipeline gets on this machine.

Owns the meaning of `auto` and what is refused. Knows torch's devices; does not know pipelines.
"""

from __future__ import annotations

import torch

from penstock.config import DTYPES, LoadConfig, OffloadConfig
from penstock.errors import ConfigError


def choose_device(config: OffloadConfig) -> torch.device:
    """The device asked for, or the first of cuda, mps and cpu that this machine has.

    Raises:
        ConfigError: for a device that this machine does not have, naming those it has.
    """
    available = available_devices()
    if config.device == "auto":
        return torch.device(available[0])
    wanted = "cuda:0" if config.device == "cuda" else config.device
    if not wanted.startswith("cuda"):
        wanted = wanted.split(":")[0]  # there is one of these
    if wanted not in available:
        raise ConfigError(
            f"device={config.device!r} is not on this machine (torch {torch.__version__}); "
            f"it has {', '.join(available)}. Choose one of these, or auto."
        )
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Devices of this machine, fastest kind first; the last one is always `cpu`."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def choose_dtype(config: LoadConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; for `auto` float32 on the CPU, bfloat16 on GPUs (float16 where they lack it).

    Raises:
        ConfigError: for float16 on the CPU, and bfloat16 on a GPU without it.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    dtype: torch.dtype = getattr(torch, DTYPES[config.dtype])
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(
            "dtype='float16' is not supported on the CPU: many operations have no such kernel there. "
            "Use --dtype float32, or bfloat16 for half the memory."
        )
    if dtype == torch.bfloat16 and not has_bfloat16:
        raise ConfigError(
            f"dtype='bfloat16' is not supported on {device}: {torch.cuda.get_device_name(device)} has no bfloat16 "
            "units. Use --dtype float16 or float32."
        )
    return dtype

"""The device that these tests run on, with kernels that give the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts


@pytest.fixture(autouse=True)
def deterministic_kernels() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("PENSTOCK_GPU_TESTS", "cuda"))


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, where it has memory of its own that can be counted."""
    if device.type != "cuda":
        pytest.skip("counts what CUDA allocates")
    return device

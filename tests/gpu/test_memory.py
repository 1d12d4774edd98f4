"""The bytes on the device are those promised: counted by CUDA's allocator, not by the streamer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import penstock
from tests.gpu.test_parity import made

pytestmark = pytest.mark.gpu
SLACK_BYTES = 2 * 2**20
"""The allocator hands out blocks of 512 bytes, and of 2 MiB where they are small."""


def peak_bytes(pipeline: Any, name: str, cuda: torch.device, before: int) -> int:
    torch.cuda.reset_peak_memory_stats(cuda)
    made(pipeline, name)
    return torch.cuda.max_memory_allocated(cuda) - before


@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl"])
@pytest.mark.parametrize("mode", ["layerwise", "sequential"])
def test_the_peak_is_what_was_promised(
    name: str, mode: str, zoo_folder: Callable[[str], Path], cuda: torch.device
) -> None:
    folder = zoo_folder(name)
    before = torch.cuda.memory_allocated(cuda)
    stock = DiffusionPipeline.from_pretrained(folder).to(cuda)
    made(stock, name)  # libraries take their workspaces
    weights = torch.cuda.memory_allocated(cuda) - before
    activations = peak_bytes(stock, name, cuda, before) - weights
    del stock
    pipeline = penstock.load(folder, device=str(cuda), dtype="float32", offload=mode, max_weight_memory="least")
    handle = penstock.placed_on(pipeline)
    assert handle is not None
    promised = handle.plan.promised_bytes
    assert promised < weights
    assert peak_bytes(pipeline, name, cuda, before) <= promised + activations + SLACK_BYTES
    handle.remove()
    del pipeline, handle
    assert torch.cuda.memory_allocated(cuda) - before <= SLACK_BYTES

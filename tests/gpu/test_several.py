"""Several GPUs: what ranks make together over NCCL is what one makes. Each case is the public command."""

from __future__ import annotations

import sys

import pytest
import torch

from tests import processes

pytestmark = [pytest.mark.gpu, pytest.mark.gpus]
SPLITS = [
    ["--ulysses-degree", "2"],
    ["--ring-degree", "2"],
    ["--cfg-parallel-size", "2"],
    ["--tensor-parallel-size", "2"],
    ["--pipeline-parallel-size", "2"],
    ["--vae-patch-parallel-size", "2"],
    ["--use-hsdp", "--hsdp-shard-size", "2", "--enable-layerwise-offload"],
    ["--use-hsdp", "--hsdp-shard-size", "2", "--ulysses-degree", "2"],
]


@pytest.mark.parametrize("flags", SPLITS, ids=" ".join)
def test_two_ranks_make_the_picture_of_one(flags: list[str], device: torch.device) -> None:
    command = [sys.executable, "-m", "penstock", "verify", "demo", "--device", device.type, "--steps", "4", *flags]
    done = processes.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr

"""Bytes: tied weights once, dtypes as the files have them, nested modules apart."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from penstock.models.ledger import Ledger, tensors_of
from penstock.weights.index import read_index
from tests.models.toys import Denoiser


def test_in_memory() -> None:
    module = Denoiser()
    ledger = Ledger()
    ledger.add(module, None)
    floats = sum(parameter.numel() for parameter in module.parameters())
    assert ledger.dtype_bytes(module) == {"F32": 4 * floats, "I64": 32}
    assert ledger.num_bytes(module.blocks[0]) == 64
    assert ledger.num_bytes(module, without=[module.blocks]) == ledger.num_bytes(module) - 3 * 64


def test_tied_weights_count_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    module["b"].weight = module["a"].weight
    ledger = Ledger()
    ledger.add(module, None)
    assert len(tensors_of(module)) == 2
    assert ledger.num_bytes(module) == 64


def test_files_say_the_dtype_and_renamed_tensors_take_the_usual_one(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    weights = {"0.weight": torch.ones(4, 4).bfloat16(), "1.weight": torch.ones(4, 4).bfloat16()}
    save_file({**weights, "renamed": torch.ones(4)}, tmp_path / "model.safetensors")
    ledger = Ledger()
    ledger.add(module, read_index(tmp_path))
    assert ledger.dtype_bytes(module) == {"BF16": 2 * (16 + 16 + 4)}

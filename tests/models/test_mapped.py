from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.models.mapped import map_tensors
from penstock.weights.index import read_index
from penstock.weights.maps import MappedFiles
from penstock.weights.ranges import FileRange

TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "f32": torch.randn(7),
    "i64": torch.arange(4),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "f8": torch.randn(6).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_mapped_tensors_are_those_of_safetensors(folder: Path) -> None:
    index = read_index(folder)
    assert index is not None
    mapped, loaded = map_tensors(index), load_file(folder / "model.safetensors")
    assert mapped.keys() == loaded.keys()
    for name, tensor in loaded.items():
        assert mapped[name].dtype == tensor.dtype and mapped[name].shape == tensor.shape
        assert torch.equal(mapped[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_mapped_tensors_lead_back_to_their_files_and_writing_spares_these(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = file.read_bytes()
    index = read_index(folder)
    assert index is not None
    tensor = map_tensors(index)["f32"]
    record = index.tensors["f32"]
    found = MappedFiles().locate(tensor.data_ptr(), record.num_bytes, torch.float32)
    assert found == FileRange(file, record.offset, record.num_bytes)
    tensor.zero_()
    assert file.read_bytes() == before
    assert MappedFiles().locate(tensor.data_ptr(), record.num_bytes, torch.float32) is None


def test_file_with_an_unusual_dtype_is_left_to_safetensors(tmp_path: Path) -> None:
    save_file({"odd": torch.arange(3).to(torch.uint16), "f32": torch.ones(2)}, tmp_path / "model.safetensors")
    index = read_index(tmp_path)
    assert index is not None
    assert torch.equal(map_tensors(index)["odd"].int(), torch.arange(3).int())

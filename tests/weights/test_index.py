"""Headers of safetensors files: right where they are right, one clear error where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.errors import WeightsError
from penstock.weights.index import read_header, read_index

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def write_shards(folder: Path, names: dict[str, str]) -> None:
    for shard in set(names.values()):
        save_file({key: TENSORS[key] for key, value in names.items() if value == shard}, folder / shard)
    text = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(text)


def test_records_lead_to_the_bytes(file: Path) -> None:
    index = read_index(file.parent)
    assert index is not None
    assert set(index.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        record = index.tensors[name]
        assert record.shape == tuple(tensor.shape)
        raw = file.read_bytes()[record.offset : record.offset + record.num_bytes]
        assert raw == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert index.num_bytes == 24 + 6 + 8
    assert index.dtype_bytes == {"F32": 24, "I64": 8, "BF16": 6}


def test_shards_are_one_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"})
    index = read_index(tmp_path)
    assert index is not None
    assert {record.file.name for record in index} == {"model-1.safetensors", "model-2.safetensors"}


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.weight": "model-1.safetensors", "a.bias": "model-2.safetensors"})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2\.safetensors: missing; .* names 2 shards"):
        read_index(tmp_path)


def test_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(WeightsError, match="not a plain file name"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}"])
def test_unreadable_shard_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="not a shard index"):
        read_index(tmp_path)


def test_folder_without_weights_has_no_index(tmp_path: Path) -> None:
    assert read_index(tmp_path) is None


def test_variant_and_its_fallback(file: Path) -> None:
    save_file({"half": torch.ones(2, dtype=torch.float16)}, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    variant, plain = read_index(file.parent, "fp16"), read_index(file.parent, "bf16")
    assert variant is not None and plain is not None
    assert list(variant.tensors) == ["half"]
    assert set(plain.tensors) == set(TENSORS)


@pytest.mark.parametrize("kept", [0, 4, 40])
def test_cut_in_the_header(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="corrupt or truncated"):
        read_header(file)


def test_cut_in_the_tensors_says_how_much_is_missing(file: Path) -> None:
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=rf"{whole - 5} bytes, but its header describes {whole}"):
        read_header(file)


def test_trailing_bytes_are_noticed(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(WeightsError, match="but its header describes"):
        read_header(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},  # two floats need eight bytes
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]},
        "no entry",
    ],
)
def test_nonsense_in_the_header(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(WeightsError, match="corrupt header"):
        read_header(path)

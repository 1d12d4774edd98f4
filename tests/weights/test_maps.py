"""From an address to its file: found where the bytes still are the file's, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from penstock.weights.index import read_header, read_index
from penstock.weights.maps import MappedFiles, file_identity, give_back
from penstock.weights.ranges import PAGE_BYTES, FileRange, memory_of

TENSORS = {
    "half": torch.randn(5000).to(torch.bfloat16),
    "large": torch.arange(9000, dtype=torch.float32),
    "small": torch.arange(3, dtype=torch.int64),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a model.safetensors"
    save_file(TENSORS, path)
    return path


def locate(tensor: torch.Tensor, files: MappedFiles | None = None) -> FileRange | None:
    return (files or MappedFiles()).locate(tensor.data_ptr(), tensor.nbytes, tensor.dtype)


def ranges(file: Path) -> dict[str, FileRange]:
    return {record.name: FileRange(file, record.offset, record.num_bytes) for record in read_header(file)}


def test_mapped_tensors_lead_to_their_file(file: Path) -> None:
    loaded = load_file(file)
    assert {name: locate(tensor) for name, tensor in loaded.items()} == ranges(file)


def test_a_model_that_diffusers_loaded_is_found_whole(tmp_path: Path) -> None:
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)  # fmt: skip
    model = AutoencoderTiny.from_pretrained(tmp_path)
    files, index = MappedFiles(), read_index(tmp_path)
    assert index is not None
    for name, parameter in model.named_parameters():
        record = index.tensors[name]
        assert locate(parameter, files) == FileRange(record.file, record.offset, record.num_bytes)


def test_the_hubs_cache_names_files_by_their_hash(file: Path, tmp_path: Path) -> None:
    blob = tmp_path / "0123456789abcdef"
    file.rename(blob)
    file.symlink_to(blob)
    assert locate(load_file(file)["large"]) == ranges(blob)["large"]


def test_a_view_is_a_range_within_its_tensor(file: Path) -> None:
    view = load_file(file)["large"].view(90, 100)[20:30]
    whole = ranges(file)["large"]
    assert locate(view) == FileRange(file, whole.offset + 8000, 4000)


def test_a_range_over_two_tensors_is_no_tensors(file: Path) -> None:
    loaded = load_file(file)
    first = min(loaded.values(), key=lambda tensor: tensor.data_ptr())
    files = MappedFiles()
    assert locate(first, files) is not None
    assert files.locate(first.data_ptr(), first.nbytes + first.itemsize, first.dtype) is None
    assert files.locate(first.data_ptr() - 8, 8, first.dtype) is None  # the header


def test_a_written_page_is_memory_and_its_neighbours_are_not(file: Path) -> None:
    large = load_file(file)["large"]
    large[4500] += 1.0
    files = MappedFiles()
    assert locate(large, files) is None
    assert locate(large[4500:4501], files) is None
    assert locate(large[:3000], files) is not None
    assert locate(large[6000:], files) is not None


def test_a_write_of_the_same_value_counts_as_a_write(file: Path) -> None:
    large = load_file(file)["large"]
    large.copy_(TENSORS["large"])
    assert locate(large) is None


def test_a_deleted_file_is_memory(file: Path) -> None:
    large = load_file(file)["large"]
    before = MappedFiles()
    file.unlink()
    assert locate(large) is None
    assert locate(large, before) is None
    save_file(TENSORS, f"{file} (deleted)")  # as the system calls the one that is gone
    assert locate(large) is None


def test_a_replaced_file_is_memory(file: Path) -> None:
    large = load_file(file)["large"]
    other = file.with_name("other")
    save_file(TENSORS, other)
    os.replace(other, file)
    assert locate(large) is None
    assert locate(load_file(file)["large"]) is not None


@pytest.mark.parametrize(
    ("dtype", "is_found"),
    [(torch.float32, True), (torch.int32, True), (torch.bfloat16, False), (torch.float64, False), (torch.uint8, False)],
)
def test_the_header_must_agree_on_the_size_of_an_item(file: Path, dtype: torch.dtype, is_found: bool) -> None:
    large = load_file(file)["large"]
    found = MappedFiles().locate(large.data_ptr(), large.nbytes, dtype)
    assert (found is not None) == is_found


def test_other_mapped_files_are_memory(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.bin")
    pickled = torch.load(tmp_path / "model.bin", mmap=True)["large"]
    raw = tmp_path / "raw.safetensors"
    raw.write_bytes(bytes(80_000))
    mapped = torch.from_file(str(raw), size=20_000)
    assert [locate(pickled), locate(mapped)] == [None, None]


def test_ordinary_memory_and_nothing_lead_nowhere(file: Path) -> None:
    large = load_file(file)["large"]
    files = MappedFiles()
    assert locate(torch.zeros(5000), files) is None
    assert files.locate(large.data_ptr(), 0, large.dtype) is None
    assert files.locate(0, 8, torch.int64) is None


def test_a_system_without_proc_finds_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = load_file(file)["large"]
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert locate(large) is None


def test_identity_is_of_the_file_and_not_of_its_name(file: Path) -> None:
    before = file_identity(file)
    with file.open("rb") as stream:
        assert file_identity(stream.fileno()) == before
    link = file.with_name("link")
    link.symlink_to(file)
    assert file_identity(link) == before
    os.utime(file, ns=(0, 1))
    assert file_identity(file) != before


def private_bytes(file: Path) -> int:
    """What this process has written to a mapped file."""
    regions = Path("/proc/self/smaps").read_text().split("VmFlags")
    lines = [line for region in regions if str(file) in region for line in region.splitlines()]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@pytest.mark.parametrize("is_held", [True, False])
def test_pages_that_were_written_to_are_given_back_unless_somebody_has_them(file: Path, is_held: bool) -> None:
    loaded = load_file(file)
    loaded["large"] += 1
    assert private_bytes(file) >= 36_000
    memories, held = [memory_of(loaded["large"])], loaded["large"][3000:] if is_held else None
    del loaded["large"]
    given = give_back(memories)
    assert not memories
    if held is not None:
        assert given == 0 and torch.equal(held, TENSORS["large"][3000:] + 1)
    else:
        assert given >= 36_000 - 2 * PAGE_BYTES
        assert private_bytes(file) <= 2 * PAGE_BYTES
    assert torch.equal(loaded["half"], TENSORS["half"]) and torch.equal(loaded["small"], TENSORS["small"])


def test_other_memory_is_nobodys_business() -> None:
    assert give_back([memory_of(torch.ones(100_000))]) == 0

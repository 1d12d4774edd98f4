"""The host store: units as they will lie on the device, one behind the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.errors import WeightsError
from penstock.weights.host import HostStore
from penstock.weights.layout import packed
from penstock.weights.ranges import PAGE_BYTES, Cast, FileRange, Piece
from penstock.weights.reader import FileReader
from penstock.weights.sources import source_of
from tests.weights.samples import expected, file_of, random_pieces


@pytest.mark.parametrize("is_direct", [False, True])
def test_stored_units_are_the_weights_as_they_lie_on_the_device(tmp_path: Path, is_direct: bool) -> None:
    file = file_of(tmp_path / "1.safetensors", 60_000)
    reader = FileReader(is_direct)
    units = [random_pieces(seed, [file]) for seed in range(4)]
    layouts = [packed(pieces) for pieces in units]
    num_bytes = sum(layout.num_bytes for layout in layouts)
    store = HostStore(num_bytes, is_pinned=False)
    stored = [
        store.put(source_of(pieces, layout, reader), layout.num_bytes)
        for pieces, layout in zip(units, layouts, strict=True)
    ]
    told: list[tuple[int, int]] = []
    store.finish(lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(part for part in (piece.num_bytes for unit in units for piece in unit))
    whole = [[expected(piece) for piece in pieces] for pieces in units]
    reader.close()
    file.unlink()  # read once, and never again
    for unit, contents, layout in zip(stored, whole, layouts, strict=True):
        unit.check()
        (part,) = unit.parts
        target = bytearray(layout.num_bytes)
        part.write(memoryview(target))
        assert (part.position, part.num_bytes, unit.kind) == (0, layout.num_bytes, "host")
        assert bytes(target) == unit.memory.numpy().tobytes()
        for content, position in zip(contents, layout.positions, strict=True):
            assert target[position : position + len(content)] == content
    ends = [unit.memory.data_ptr() + unit.memory.numel() for unit in stored]
    assert [unit.memory.data_ptr() for unit in stored[1:]] == ends[:-1]
    store.close()


def test_stored_files_are_read_exactly_once(tmp_path: Path) -> None:
    file = file_of(tmp_path / "1.safetensors", 5 * PAGE_BYTES)
    pieces = [
        Piece(FileRange(file, 0, 4 * PAGE_BYTES)),
        Piece(FileRange(file, 4 * PAGE_BYTES, PAGE_BYTES), Cast(torch.float32, torch.float16), 2),
    ]
    layout, reader = packed(pieces), FileReader()
    store = HostStore(layout.num_bytes, is_pinned=False)
    unit = store.put(source_of(pieces, layout, reader), layout.num_bytes)
    store.finish()
    for piece, position in zip(pieces, layout.positions, strict=True):
        assert unit.memory[position : position + piece.num_bytes].numpy().tobytes() == expected(piece)
    for _ in range(3):
        unit.parts[0].write(memoryview(bytearray(layout.num_bytes)))
    assert reader.read_bytes == 5 * PAGE_BYTES
    reader.close()


def test_a_unit_that_cannot_be_read_is_an_error_in_the_end(tmp_path: Path) -> None:
    short = file_of(tmp_path / "2.safetensors", 100)
    reader = FileReader()
    pieces = [Piece(FileRange(short, 0, 800))]
    layout = packed(pieces)
    store = HostStore(layout.num_bytes, is_pinned=False)
    store.put(source_of(pieces, layout, reader), layout.num_bytes)
    with pytest.raises(WeightsError, match=r"2\.safetensors: ends at byte 100, 700 bytes too soon"):
        store.finish()
    reader.close()


def test_what_stays_on_another_device_leaves_the_hosts_memory() -> None:
    store = HostStore(4 * PAGE_BYTES, is_pinned=False, device=torch.device("meta"))
    unit = store.put(source_of([], packed([]), FileReader()), PAGE_BYTES)
    assert unit.memory.device.type == "cpu"
    store.finish()
    assert unit.memory.device.type == "meta" and unit.memory.numel() == PAGE_BYTES
    store.close()

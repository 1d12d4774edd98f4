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
    unit = HostStore(layout.num_bytes, is_pinned=False).put(source_of(pieces, layout, reader), layout.num_bytes)
    for piece, position in zip(pieces, layout.positions, strict=True):
        assert unit.memory[position : position + piece.num_bytes].numpy().tobytes() == expected(piece)
    for _ in range(3):
        unit.parts[0].write(memoryview(bytearray(layout.num_bytes)))
    assert reader.read_bytes == 5 * PAGE_BYTES
    reader.close()


def test_a_unit_that_cannot_be_read_takes_no_room(tmp_path: Path) -> None:
    good, short = file_of(tmp_path / "1.safetensors", 800), file_of(tmp_path / "2.safetensors", 100)
    reader = FileReader()
    pieces = {file: [Piece(FileRange(file, 0, 800))] for file in (good, short)}
    layout = packed(pieces[good])
    store = HostStore(layout.num_bytes, is_pinned=False)
    with pytest.raises(WeightsError, match=r"2\.safetensors: ends at byte 100, 700 bytes too soon"):
        store.put(source_of(pieces[short], layout, reader), layout.num_bytes)
    unit = store.put(source_of(pieces[good], layout, reader), layout.num_bytes)
    assert unit.memory.numel() == layout.num_bytes
    assert unit.memory[layout.positions[0] :][:800].numpy().tobytes() == good.read_bytes()
    reader.close()

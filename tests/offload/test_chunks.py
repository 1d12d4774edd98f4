"""Chunks: what goes into one, how much is one copy, and that ranges of files are read directly."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.offload import chunks
from penstock.offload.chunks import Chunks, groups
from penstock.weights import sources
from penstock.weights.layout import packed
from penstock.weights.memory import HostMemory
from penstock.weights.ranges import PAGE_BYTES, FileRange, Piece
from penstock.weights.reader import FileReader
from penstock.weights.sources import FileSource, Part
from tests.weights.samples import file_of, opens_directly

PAGE = PAGE_BYTES


def filled(parts: list[Part], num_bytes: int) -> tuple[bytes, list[list[tuple[int, int, int]]]]:
    """A unit as its groups' copies leave it, and these copies."""
    unit, copies = bytearray(num_bytes), []
    for group in groups(parts):
        memory = HostMemory(chunks._CHUNK_BYTES + 2 * PAGE)
        group.write(memory.view)
        copies.append([(copy.offset, copy.position, copy.num_bytes) for copy in group.copies])
        for offset, position, count in copies[-1]:
            unit[position : position + count] = memory.view[offset : offset + count]
    return bytes(unit), copies


def part(position: int, num_bytes: int, margin: tuple[int, int] = (0, 0)) -> Part:
    def write(memory: memoryview) -> None:
        assert len(memory) == margin[0] + num_bytes + margin[1]
        memory[:] = b"\xee" * len(memory)
        memory[margin[0] : margin[0] + num_bytes] = bytes([position % 251 + 1]) * num_bytes

    return Part(position, num_bytes, write, margin)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 4 * PAGE)


@pytest.mark.usefixtures("small_chunks")
def test_small_neighbours_are_one_copy_and_gaps_do_not_grow_it() -> None:
    unit, copies = filled([part(0, 40), part(40, 60), part(256, 8), part(2 * PAGE, 8)], 3 * PAGE)
    assert copies == [[(0, 0, 264), (PAGE, 2 * PAGE, 8)]]
    assert unit[:100] == b"\1" * 40 + b"\x29" * 60 and unit[2 * PAGE + 8] == 0


@pytest.mark.usefixtures("small_chunks")
def test_parts_with_margins_lie_apart_and_keep_their_place_in_a_page() -> None:
    parts = [part(256, 100, (7, PAGE - 107)), part(356, 50, (107, PAGE - 157)), part(406, 2 * PAGE)]
    unit, copies = filled(parts, 4 * PAGE)
    assert copies == [[(7, 256, 100), (PAGE + 107, 356, 50), (2 * PAGE, 406, 2 * PAGE)]]
    assert unit[256:406] == bytes([6]) * 100 + bytes([106]) * 50  # no margin came along
    assert 0xEE not in unit


@pytest.mark.usefixtures("small_chunks")
def test_what_does_not_fit_goes_into_the_next_chunk() -> None:
    unit, copies = filled([part(2 * PAGE * number, 2 * PAGE) for number in range(5)], 10 * PAGE)
    assert [len(group) for group in copies] == [1, 1, 1]  # pages that follow each other are one copy
    assert [group[0][2] for group in copies] == [4 * PAGE, 4 * PAGE, 2 * PAGE] and 0 not in unit
    assert groups([]) == []


def test_a_chunk_goes_back_when_its_reader_fails() -> None:
    ring = Chunks(HostMemory, num_threads=1)
    for _ in range(3 * len(ring.memories)):
        with pytest.raises(ValueError, match="here"), ring.taken():
            raise ValueError("here")
    ring.close()


def test_there_is_a_chunk_for_every_reader() -> None:
    made: list[int] = []

    def make(num_bytes: int) -> HostMemory:
        made.append(num_bytes)
        return HostMemory(PAGE)

    Chunks(make, num_threads=9)
    assert len(made) >= 9 and set(made) == {chunks._CHUNK_BYTES + 2 * PAGE}


def test_pieces_of_a_file_are_read_directly_wherever_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator a weight begins at 256 bytes, in its file anywhere: the chunk keeps it as the file has it."""
    file = file_of(tmp_path / "weights.safetensors", 30 * PAGE + 100)
    if not opens_directly(file):
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr(sources, "PART_BYTES", 2 * PAGE)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 4 * PAGE)
    places = [(108, 12 * PAGE), (108 + 12 * PAGE, 512), (620 + 12 * PAGE, 10), (17 * PAGE + 3, 9 * PAGE)]
    pieces = [Piece(FileRange(file, offset, num_bytes)) for offset, num_bytes in places]
    layout = packed(pieces)
    assert len(layout.runs) == 2  # what follows each other in the file does so on the device
    reader = FileReader(is_direct=True)
    unit, _ = filled(list(FileSource(pieces, layout, reader).parts), layout.num_bytes)
    whole = file.read_bytes()
    for position, (offset, num_bytes) in zip(layout.positions, places, strict=True):
        assert unit[position : position + num_bytes] == whole[offset : offset + num_bytes]
    assert reader.cached_bytes == 0 and not hasattr(reader._pages, "memory")  # nor with a copy more
    reader.close()

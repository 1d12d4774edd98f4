"""Sources: parts in any order, on any thread, make exactly the bytes that the weights have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from penstock.errors import WeightsError
from penstock.weights import sources
from penstock.weights.layout import Layout, packed, paged
from penstock.weights.memory import HostMemory
from penstock.weights.ranges import PAGE_BYTES, Cast, FileRange, Piece, Unread
from penstock.weights.reader import FileReader
from penstock.weights.sources import PART_BYTES, Part, Source, source_of
from tests.weights.samples import BF16_TO_F32, CASTS, F8_TO_F32, F32_TO_BF16, expected, file_of, host, random_pieces

LayoutOf = Callable[[Sequence[Piece]], Layout]
SMALL_PARTS = 2 * PAGE_BYTES
UNTOUCHED = 0xAA


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [file_of(folder / f"{number}.safetensors", 100_000, number) for number in range(2)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", SMALL_PARTS)


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def reader(request: pytest.FixtureRequest) -> Iterator[FileReader]:
    reader = FileReader(is_direct=request.param)
    yield reader
    reader.close()


def carry_out(parts: Sequence[Part], layout: Layout, has_margins: bool, seed: int = 0, begin: int = 0) -> bytes:
    """Write all parts in random order, twice, by four threads, into memory with a page before and behind the unit."""
    memory = HostMemory(layout.num_bytes + 2 * PAGE_BYTES)
    memory.tensor.fill_(UNTOUCHED)
    begin = begin or PAGE_BYTES

    def write(part: Part) -> None:
        before, after = part.margin if has_margins else (0, 0)
        first = begin + part.position
        part.write(memory.view[first - before : first + part.num_bytes + after])

    shuffled = [*parts, *parts]
    Random(seed).shuffle(shuffled)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, shuffled))
    assert set(memory.view[:begin]) == {UNTOUCHED}
    assert set(memory.view[begin + layout.num_bytes :]) <= {UNTOUCHED}
    return bytes(memory.view[begin : begin + layout.num_bytes])


def require_exact(pieces: Sequence[Piece], layout: Layout, found: bytes) -> None:
    for piece, position in zip(pieces, layout.positions, strict=True):
        assert found[position : position + piece.num_bytes] == expected(piece)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("layout_of", "has_margins"), [(paged, True), (paged, False), (packed, False)])
def test_parts_in_any_order_make_exactly_the_weights(
    seed: int, layout_of: LayoutOf, has_margins: bool, files: list[Path], reader: FileReader
) -> None:
    pieces = random_pieces(seed, files, largest=30_000)
    layout = layout_of(pieces)
    source = source_of(pieces, layout, reader)
    shift = 0 if layout_of is paged else PAGE_BYTES + 256  # on an accelerator units begin anywhere
    require_exact(pieces, layout, carry_out(source.parts, layout, has_margins, seed, shift))
    source.check()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("layout_of", [paged, packed])
def test_parts_are_in_order_small_and_leave_their_neighbours_alone(
    seed: int, layout_of: LayoutOf, files: list[Path], reader: FileReader
) -> None:
    pieces = random_pieces(seed, files, largest=30_000)
    if seed % 2:
        pieces = [piece for piece in pieces if isinstance(piece.range, FileRange)]
    layout = layout_of(pieces)
    parts = list(source_of(pieces, layout, reader).parts)
    has_margins = layout_of is paged  # on an accelerator parts get theirs in chunks, each for itself
    touched = [
        (part.position - has_margins * part.margin[0], part.position + part.num_bytes + has_margins * part.margin[1])
        for part in parts
    ]
    assert all(end <= begin for (_, end), (begin, _) in pairwise(touched))
    assert touched[0][0] >= 0 and touched[-1][1] <= layout.num_bytes
    assert all(0 < part.num_bytes <= SMALL_PARTS for part in parts)
    covered = sum(part.num_bytes for part in parts)
    gaps = sum(run.range.num_bytes for run in layout.runs)  # those within runs are read too
    assert sum(piece.num_bytes for piece in pieces) <= covered <= sum(piece.num_bytes for piece in pieces) + gaps


def test_a_large_file_is_cut_at_pages_so_that_every_part_is_direct(tmp_path: Path, reader: FileReader) -> None:
    offset, num_bytes = 136, 2 * PART_BYTES + 5000
    file = file_of(tmp_path / "large.safetensors", offset + num_bytes)
    pieces = [Piece(FileRange(file, offset, num_bytes), itemsize=8)]
    layout = paged(pieces)
    source = source_of(pieces, layout, reader)
    begin = layout.positions[0]
    assert [part.position - begin + offset for part in source.parts] == [offset, PART_BYTES, 2 * PART_BYTES]
    assert [part.num_bytes for part in source.parts] == [PART_BYTES - offset, PART_BYTES, 5000 + offset]
    assert [part.margin for part in source.parts] == [(offset, 0), (0, 0), (0, -(5000 + offset) % PAGE_BYTES)]
    require_exact(pieces, layout, carry_out(source.parts, layout, has_margins=True))


@pytest.mark.parametrize("cast", CASTS, ids=str)
@pytest.mark.parametrize("is_in_file", [True, False])
def test_a_cast_is_torchs_own_and_no_part_is_too_large(
    cast: Cast, is_in_file: bool, tmp_path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", SMALL_PARTS)
    num_bytes = 40_008
    place = FileRange(file_of(tmp_path / "1.safetensors", num_bytes + 3), 3, num_bytes)
    pieces = [Piece(place if is_in_file else host(num_bytes, 4), cast, cast.wanted.itemsize)]
    layout = paged(pieces)
    source = source_of(pieces, layout, reader)
    assert all(part.num_bytes <= SMALL_PARTS for part in source.parts)
    assert len(source.parts) > 2
    require_exact(pieces, layout, carry_out(source.parts, layout, has_margins=True))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float64, torch.bfloat16),
        (torch.int64, torch.float32),
        (torch.uint8, torch.bool),
        (torch.bool, torch.half),
    ],
    ids=str,
)
def test_other_casts_of_memory_are_torchs_own_too(stored: torch.dtype, wanted: torch.dtype) -> None:
    values = (torch.arange(1000) % 5).to(stored)
    place = host(values.nbytes)
    place.memory.copy_(values.view(torch.uint8))
    pieces = [Piece(place, Cast(stored, wanted), wanted.itemsize)]
    layout = packed(pieces)
    found = carry_out(source_of(pieces, layout, FileReader()).parts, layout, has_margins=False)
    wanted_bytes = values.to(wanted).view(torch.uint8).numpy().tobytes()
    assert found[layout.positions[0] :][: len(wanted_bytes)] == wanted_bytes


def test_the_kind_says_where_the_bytes_come_from(files: list[Path]) -> None:
    in_file, in_memory = Piece(FileRange(files[0], 0, 8)), Piece(host(8))
    kinds = {"file": [in_file], "host": [in_memory], "file+host": [in_memory, in_file]}
    reader = FileReader()
    assert kinds == {source_of(pieces, paged(pieces), reader).kind: pieces for pieces in kinds.values()}
    assert not source_of([Piece(Unread(8))], paged([Piece(Unread(8))]), reader).parts
    reader.close()


def changed_source(file: Path, cast: Cast | None, is_mixed: bool, reader: FileReader) -> Source:
    pieces = [Piece(FileRange(file, 0, 4000), cast), *([Piece(host(16))] if is_mixed else [])]
    return source_of(pieces, paged(pieces), reader)


@pytest.mark.parametrize("cast", [None, F32_TO_BF16, BF16_TO_F32, F8_TO_F32], ids=str)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_file_that_changes_before_its_first_fill_is_refused(
    cast: Cast | None, is_mixed: bool, tmp_path: Path, reader: FileReader
) -> None:
    file = file_of(tmp_path / "1.safetensors", 4000)
    source = changed_source(file, cast, is_mixed, reader)
    other = file_of(tmp_path / "other", 4000, seed=1)
    os.replace(other, file)
    with pytest.raises(WeightsError, match=r"1\.safetensors: changed while its weights are streamed"):
        source.check()


def test_a_missing_file_is_named_at_once(tmp_path: Path, reader: FileReader) -> None:
    with pytest.raises(WeightsError, match=r"gone\.safetensors: cannot be read"):
        changed_source(tmp_path / "gone.safetensors", None, False, reader)


def test_memory_is_never_refused() -> None:
    place = host(16)
    pieces = [Piece(place)]
    layout = paged(pieces)
    source = source_of(pieces, layout, FileReader())
    place.memory.zero_()  # what is written is what the weights are when a part is carried out
    source.check()
    assert not any(carry_out(source.parts, layout, has_margins=True)[layout.positions[0] :][:16])

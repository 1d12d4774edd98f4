"""Places within a unit: aligned, apart, and on the CPU where direct reads and equal roundings need them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from penstock.weights.layout import Layout, Run, is_direct, packed, paged
from penstock.weights.ranges import (
    ALIGNMENT_BYTES,
    CACHE_LINE_BYTES,
    PAGE_BYTES,
    Cast,
    FileRange,
    HostRange,
    Piece,
    Unread,
)
from tests.weights.samples import F32_TO_BF16, file_of, host, random_pieces

ONE, TWO = Path("1.safetensors"), Path("2.safetensors")


def of_file(offset: int, num_bytes: int, file: Path = ONE, itemsize: int = 1, cast: Cast | None = None) -> Piece:
    return Piece(FileRange(file, offset, num_bytes), cast, itemsize)


def spans(pieces: list[Piece], layout: Layout) -> list[tuple[int, int]]:
    return sorted((at, at + piece.num_bytes) for piece, at in zip(pieces, layout.positions, strict=True))


def require_apart(pieces: list[Piece], layout: Layout) -> None:
    found = spans(pieces, layout)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(found))
    assert all(begin > 0 and end <= layout.num_bytes for begin, end in found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("layout")
    return [file_of(folder / f"{number}.safetensors", 60_000, number) for number in range(2)]


@pytest.mark.parametrize("sizes", [[], [1], [256], [257, 3, 512], [0, 8]])
def test_packed_pieces_begin_at_multiples_of_256_and_never_at_0(sizes: list[int]) -> None:
    layout = packed([Piece(Unread(size)) for size in sizes])
    assert len(layout.positions) == len(sizes)
    assert not any(position % ALIGNMENT_BYTES for position in (*layout.positions, layout.num_bytes))
    assert min(layout.positions, default=ALIGNMENT_BYTES) == ALIGNMENT_BYTES
    assert layout.num_bytes == ALIGNMENT_BYTES + sum(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes)
    assert layout.runs == ()


@pytest.mark.parametrize("seed", range(30))
def test_pieces_never_overlap(seed: int, files: list[Path]) -> None:
    pieces = random_pieces(seed, files)
    for layout in (packed(pieces), paged(pieces)):
        require_apart(pieces, layout)
        for piece, position in zip(pieces, layout.positions, strict=True):
            assert position % piece.itemsize == 0
    assert packed(pieces).num_bytes % ALIGNMENT_BYTES == 0
    assert paged(pieces).num_bytes % PAGE_BYTES == 0


@pytest.mark.parametrize("seed", range(30))
def test_runs_bring_every_direct_piece_to_its_place_and_own_their_pages(seed: int, files: list[Path]) -> None:
    pieces = random_pieces(seed, files)
    layout = paged(pieces)
    pages = []
    for run in layout.runs:
        assert run.position % PAGE_BYTES == run.range.offset % PAGE_BYTES
        end = run.position + run.range.num_bytes
        pages.append((run.position // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(pages)))
    assert all(end <= layout.num_bytes for _, end in pages)
    for piece, position in zip(pieces, layout.positions, strict=True):
        carried = [run for run in layout.runs if carries(run, piece, position)]
        assert len(carried) == is_direct(piece)
        if not carried:
            assert not any(begin < position + piece.num_bytes and position < end for begin, end in pages)


def carries(run: Run, piece: Piece, position: int) -> bool:
    place = piece.range
    if piece.cast is not None or not isinstance(place, FileRange) or place.file != run.range.file:
        return False
    distance = place.offset - run.range.offset
    is_inside = distance >= 0 and distance + place.num_bytes <= run.range.num_bytes
    return is_inside and position == run.position + distance


def test_a_direct_piece_has_the_address_modulo_a_page_that_it_has_in_its_file() -> None:
    pieces = [of_file(offset, 24, itemsize=8) for offset in (136, 5000, 3 * PAGE_BYTES, 9 * PAGE_BYTES + 8)]
    for piece, position in zip(pieces, paged(pieces).positions, strict=True):
        assert isinstance(piece.range, FileRange)
        assert position % PAGE_BYTES == piece.range.offset % PAGE_BYTES


@pytest.mark.parametrize(
    ("pieces", "runs"),
    [
        ([of_file(100, 50), of_file(150, 30)], [(ONE, 100, 80)]),
        ([of_file(150, 30), of_file(100, 50)], [(ONE, 100, 80)]),  # in the order of the file
        ([of_file(100, 50), of_file(150 + PAGE_BYTES - 1, 9)], [(ONE, 100, 50 + PAGE_BYTES - 1 + 9)]),
        ([of_file(100, 50), of_file(150 + PAGE_BYTES, 9)], [(ONE, 100, 50), (ONE, 150 + PAGE_BYTES, 9)]),
        ([of_file(100, 50), of_file(150, 9, TWO)], [(ONE, 100, 50), (TWO, 150, 9)]),
        ([of_file(PAGE_BYTES, 8), of_file(9 * PAGE_BYTES, 8, TWO)], [(ONE, PAGE_BYTES, 8), (TWO, 9 * PAGE_BYTES, 8)]),
        ([of_file(100, 500), of_file(120, 30), of_file(600, 8)], [(ONE, 100, 508)]),  # one within another
        ([of_file(100, 9000), of_file(120, 30), of_file(9200, 8)], [(ONE, 100, 9108)]),
        (
            [of_file(100, 9000), of_file(150, 9, TWO), of_file(9100, 8, TWO)],
            [(ONE, 100, 9000), (TWO, 150, 9), (TWO, 9100, 8)],
        ),
        ([of_file(100, 50, cast=F32_TO_BF16), of_file(151, 8, itemsize=2)], []),
    ],
)
def test_neighbours_in_a_file_are_one_run(pieces: list[Piece], runs: list[tuple[Path, int, int]]) -> None:
    found = [(run.range.file, run.range.offset, run.range.num_bytes) for run in paged(pieces).runs]
    assert found == runs


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (of_file(8, 8, itemsize=8), True),
        (of_file(12, 8, itemsize=8), False),
        (of_file(8, 8, cast=F32_TO_BF16), False),
        (Piece(Unread(8)), False),
        (Piece(HostRange(torch.zeros(8, dtype=torch.uint8))), False),
    ],
)
def test_direct_is_what_needs_no_step_between(piece: Piece, expected: bool) -> None:
    assert is_direct(piece) is expected


@pytest.mark.parametrize(
    ("skew", "itemsize", "kept"), [(0, 4, 0), (4, 4, 4), (48, 16, 48), (60, 4, 60), (6, 4, 0), (1, 2, 0)]
)
def test_memory_keeps_its_place_in_a_cache_line_where_items_fit_there(skew: int, itemsize: int, kept: int) -> None:
    pieces = [Piece(Unread(7)), Piece(host(100, skew), itemsize=itemsize), of_file(500, 8)]
    layout = paged(pieces)
    assert layout.positions[1] % CACHE_LINE_BYTES == kept
    require_apart(pieces, layout)


def test_a_run_that_ends_just_behind_a_page_keeps_the_rest_of_the_next() -> None:
    layout = paged([of_file(0, PAGE_BYTES + 1), of_file(9 * PAGE_BYTES, 8)])
    assert layout.positions == (PAGE_BYTES, 3 * PAGE_BYTES)


def test_what_is_cast_begins_a_cache_line() -> None:
    pieces = [Piece(Unread(7)), Piece(host(100, 4), F32_TO_BF16, 2), of_file(68, 8, cast=F32_TO_BF16)]
    layout = paged(pieces)
    assert [position % CACHE_LINE_BYTES for position in layout.positions[1:]] == [0, 0]
    require_apart(pieces, layout)


def test_an_offset_that_does_not_fit_its_items_is_moved_to_one_that_does() -> None:
    pieces = [of_file(1001, 800, itemsize=4), of_file(1801, 8, itemsize=1)]
    layout = paged(pieces)
    assert layout.positions[0] % CACHE_LINE_BYTES == 0
    assert [run.range.offset for run in layout.runs] == [1801]
    require_apart(pieces, layout)

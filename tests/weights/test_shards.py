"""Shards: the parts of a unit, put together, are the unit, wherever its bytes come from and whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.weights.layout import Layout, packed, paged
from penstock.weights.ranges import ALIGNMENT_BYTES, PAGE_BYTES, Cast, FileRange, Piece, Unread
from penstock.weights.reader import FileReader
from penstock.weights.shards import ShardSource, cut, padded, written_bytes
from penstock.weights.sources import HostSource, Source, source_of
from tests.weights.samples import expected, file_of, random_pieces


class Rank:
    """One of several ranks that gather nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_gather_into(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        raise AssertionError("not here")


def written(source: Source, num_bytes: int) -> bytearray:
    """What a source writes into memory that was full of ones; margins are lent as a transfer lends them."""
    room = bytearray(b"\xff" * (num_bytes + 2 * PAGE_BYTES))
    for part in source.parts:
        before, after = part.margin
        begin = PAGE_BYTES + part.position
        saved = room[begin - before : begin], room[begin + part.num_bytes :][:after]
        part.write(memoryview(room)[begin - before : begin + part.num_bytes + after])
        room[begin - before : begin] = saved[0]
        room[begin + part.num_bytes : begin + part.num_bytes + after] = saved[1]
    return room[PAGE_BYTES : PAGE_BYTES + num_bytes]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_paged", [True, False])
def test_the_parts_are_the_unit(tmp_path: Path, is_paged: bool, seed: int, num_ranks: int) -> None:
    files = [file_of(tmp_path / f"{number}.safetensors", 90_000, seed + number) for number in range(2)]
    pieces = random_pieces(seed, files)
    if is_paged:
        layout = padded(paged(pieces, is_shared=True), num_ranks, PAGE_BYTES)
    else:
        layout = padded(packed(pieces), num_ranks, ALIGNMENT_BYTES)
    reader = FileReader(is_direct=True)
    size = layout.num_bytes // num_ranks
    whole = bytearray()
    for rank in range(num_ranks):
        part = cut(pieces, layout, rank * size, (rank + 1) * size)
        source = ShardSource(source_of(part.pieces, part.layout, reader), Rank(rank, num_ranks), layout.num_bytes)
        assert (source.begin, source.part_bytes) == (rank * size, size)
        whole += written(source, size)
    for piece, position in zip(pieces, layout.positions, strict=True):
        assert whole[position : position + piece.num_bytes] == expected(piece)
    reader.close()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_read_each_byte_once_between_them(tmp_path: Path, num_ranks: int) -> None:
    file = file_of(tmp_path / "1.safetensors", 40 * PAGE_BYTES)
    pieces = [Piece(FileRange(file, number * 8 * PAGE_BYTES, 8 * PAGE_BYTES), itemsize=4) for number in range(5)]
    layout = padded(paged(pieces, is_shared=True), num_ranks, PAGE_BYTES)
    size, read = layout.num_bytes // num_ranks, []
    for rank in range(num_ranks):
        reader = FileReader()
        part = cut(pieces, layout, rank * size, (rank + 1) * size)
        written(source_of(part.pieces, part.layout, reader), size)
        read.append(reader.read_bytes)
        reader.close()
    assert sum(read) == 40 * PAGE_BYTES
    assert max(read) <= size


def test_a_part_knows_its_own_pieces_only() -> None:
    pieces = [Piece(Unread(100)), Piece(Unread(100), Cast(torch.float32, torch.bfloat16), 2)]
    layout = Layout((256, 512), 1024)
    first, second = cut(pieces, layout, 0, 520), cut(pieces, layout, 520, 1024)
    assert [piece.num_bytes for piece in first.pieces] == [100, 8]
    assert first.layout.positions == (256, 512)
    assert [piece.range.num_bytes for piece in second.pieces] == [84]
    assert second.layout.positions == (0,)
    assert cut(pieces, layout, 700, 1024).pieces == ()


def test_a_part_is_checked_as_its_source_is(tmp_path: Path) -> None:
    source = ShardSource(HostSource([], packed([])), Rank(0, 2), 512)
    source.check()
    assert source.kind == "host" and not source.parts
    assert written_bytes(source) == 256 and written_bytes(source.own) == 0


def test_units_are_padded_to_equal_parts() -> None:
    assert padded(Layout((256,), 4096), 3, PAGE_BYTES).num_bytes == 3 * PAGE_BYTES
    assert padded(Layout((256,), 4096), 1, PAGE_BYTES).num_bytes == PAGE_BYTES

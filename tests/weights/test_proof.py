"""Proof of fills: right bytes pass, and a single wrong one does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.errors import WeightsError
from penstock.weights.layout import Layout, paged
from penstock.weights.memory import Arena
from penstock.weights.proof import Proof, fingerprint
from penstock.weights.ranges import PAGE_BYTES, FileRange, HostRange, Piece
from tests.weights.samples import BF16_TO_F32, F32_TO_BF16, expected, file_of, host


@pytest.fixture
def pieces(tmp_path: Path) -> list[Piece]:
    file = file_of(tmp_path / "1.safetensors", 20_000)
    return [
        Piece(FileRange(file, 136, 9000), itemsize=4),
        Piece(host(800, 4), itemsize=4),
        Piece(FileRange(file, 10_000, 4000), F32_TO_BF16, 2),
        Piece(host(400, 4), BF16_TO_F32, 4),
    ]


def filled(pieces: list[Piece], begin: int) -> tuple[Arena, Layout]:
    layout = paged(pieces)
    arena = Arena(begin + layout.num_bytes, torch.device("cpu"))
    for piece, position in zip(pieces, layout.positions, strict=True):
        found = torch.frombuffer(bytearray(expected(piece)), dtype=torch.uint8)
        arena.tensor[begin + position : begin + position + piece.num_bytes] = found
    return arena, layout


def test_right_bytes_pass_every_time(pieces: list[Piece]) -> None:
    arena, layout = filled(pieces, PAGE_BYTES)
    proof = Proof(arena)
    for _ in range(2):
        proof.verify("block 1", pieces, layout, PAGE_BYTES)
    assert proof.num_checked == 2 * len(pieces)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("is_first", [True, False])
def test_one_flipped_bit_is_found_and_named(pieces: list[Piece], number: int, is_first: bool) -> None:
    arena, layout = filled(pieces, PAGE_BYTES)
    proof = Proof(arena)
    proof.verify("block 1", pieces, layout, PAGE_BYTES)
    piece, first = pieces[number], PAGE_BYTES + layout.positions[number]
    arena.tensor[first if is_first else first + piece.num_bytes - 1] ^= 1
    place = piece.range
    origin = rf"1\.safetensors from byte {place.offset}" if isinstance(place, FileRange) else "the weights in memory"
    with pytest.raises(WeightsError, match=rf"block 1: {piece.num_bytes} bytes at {first} are not those of .*{origin}"):
        proof.verify("block 1", pieces, layout, PAGE_BYTES)


def test_gaps_between_pieces_do_not_matter(pieces: list[Piece]) -> None:
    arena, layout = filled(pieces, 0)
    arena.poison(0, layout.positions[1])
    Proof(arena).verify("block 1", pieces, layout, 0)
    arena.poison(0, layout.positions[1] + 1)
    with pytest.raises(WeightsError):
        Proof(arena).verify("block 1", pieces, layout, 0)


def test_the_file_as_it_was_first_seen_is_the_reference(pieces: list[Piece]) -> None:
    arena, layout = filled(pieces, 0)
    proof = Proof(arena)
    proof.verify("block 1", pieces, layout, 0)
    assert isinstance(pieces[0].range, FileRange)
    file_of(pieces[0].range.file, 20_000, seed=1)
    arena.tensor.copy_(filled(pieces, 0)[0].tensor)  # a streamer that did not notice
    with pytest.raises(WeightsError, match="The file may have changed"):
        proof.verify("block 1", pieces, layout, 0)


def test_a_fingerprint_tells_other_weights_wherever_they_are(tmp_path: Path, pieces: list[Piece]) -> None:
    found = fingerprint(pieces)
    assert found == fingerprint(pieces) != fingerprint(pieces[1:])
    assert isinstance(pieces[1].range, HostRange) and isinstance(pieces[0].range, FileRange)
    pieces[1].range.memory[5] ^= 1
    changed = fingerprint(pieces)
    with pieces[0].range.file.open("r+b") as stream:
        stream.seek(136 + PAGE_BYTES - 1)
        stream.write(b"?!")
    assert len({found, changed, fingerprint(pieces)}) == 3
    pieces[0].range.file.unlink()
    with pytest.raises(WeightsError, match=r"1.safetensors: 4096 bytes from 136 cannot be read"):
        fingerprint(pieces)

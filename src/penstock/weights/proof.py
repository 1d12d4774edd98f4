"""Proof that what is on the device is what the files say: hashes after every fill.

Slow on purpose, and independent of the readers: the reference is read by plain file operations, once per piece.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from penstock.errors import WeightsError
from penstock.weights.layout import Layout
from penstock.weights.memory import Arena
from penstock.weights.ranges import PAGE_BYTES, FileRange, HostRange, Piece

_DIGEST_BYTES = 16


class Proof:
    """Checks fills against their origin.

    Attributes:
        num_checked: pieces compared so far.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._expected: dict[tuple[str, int], bytes] = {}  # by the unit's name and the piece's number
        self.num_checked = 0

    def expect(self, name: str, pieces: Sequence[Piece]) -> None:
        """Remember what a unit is to be, for when its origin will be gone."""
        for number, piece in enumerate(pieces):
            if (name, number) not in self._expected:
                self._expected[name, number] = _digest(_origin(piece))

    def verify(self, name: str, pieces: Sequence[Piece], layout: Layout, begin: int) -> None:
        """Compare a unit on the device with its origin.

        Raises:
            WeightsError: where they differ.

        Cost: hashes the unit's bytes; on an accelerator they are copied to the host for it.
        """
        self.expect(name, pieces)
        for number, (piece, position) in enumerate(zip(pieces, layout.positions, strict=True)):
            first = begin + position
            found = _digest(self._arena.tensor[first : first + piece.num_bytes].cpu())
            if found != self._expected[name, number]:
                raise WeightsError(
                    f"{name}: {piece.num_bytes} bytes at {first} are not those of {_where(piece)}. The file may have "
                    "changed; if it has not, please report this."
                )
            self.num_checked += 1


def fingerprint(pieces: Sequence[Piece]) -> int:
    """A checksum of the first page of each piece: tells other weights of the same layout, not every other byte.

    Raises:
        WeightsError: for files that cannot be read.

    Cost: 4 KiB read per piece.
    """
    found = 0
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for piece in pieces:
            found = zlib.crc32(_first_page(piece, files, stack), found)
    return found


def _first_page(piece: Piece, files: dict[Path, BinaryIO], stack: ExitStack) -> bytes:
    num_bytes = min(piece.range.num_bytes, PAGE_BYTES)
    if isinstance(piece.range, HostRange):
        return piece.range.memory[:num_bytes].numpy().tobytes()
    assert isinstance(piece.range, FileRange)
    file = piece.range.file
    try:
        if file not in files:
            files[file] = stack.enter_context(file.open("rb", buffering=0))
        return os.pread(files[file].fileno(), num_bytes, piece.range.offset)
    except OSError as error:
        raise WeightsError(f"{file}: {num_bytes} bytes from {piece.range.offset} cannot be read: {error}.") from error


def _digest(memory: torch.Tensor) -> bytes:
    return hashlib.blake2b(memory.contiguous().numpy().data, digest_size=_DIGEST_BYTES).digest()


def _origin(piece: Piece) -> torch.Tensor:
    stored = _stored(piece)
    if piece.cast is None:
        return stored
    return stored.clone().view(piece.cast.stored).to(piece.cast.wanted).view(torch.uint8)


def _stored(piece: Piece) -> torch.Tensor:
    if isinstance(piece.range, FileRange):
        with Path(piece.range.file).open("rb") as stream:
            stream.seek(piece.range.offset)
            return torch.frombuffer(bytearray(stream.read(piece.range.num_bytes)), dtype=torch.uint8)
    assert isinstance(piece.range, HostRange)
    return piece.range.memory


def _where(piece: Piece) -> str:
    if isinstance(piece.range, FileRange):
        return f"{piece.range.file} from byte {piece.range.offset}"
    return "the weights in memory"

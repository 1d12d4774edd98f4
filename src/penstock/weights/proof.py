"""Proof that what is on the device is what the files say: hashes after every fill.

Slow on purpose, and independent of the readers: the reference is read by plain file operations, once per piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from penstock.errors import WeightsError
from penstock.weights.layout import Layout
from penstock.weights.memory import Arena
from penstock.weights.ranges import FileRange, HostRange, Piece

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

"""Where each piece of a unit lies inside its part of the device's memory.

On the CPU a piece keeps the place within a page that it has in its file (or in memory), for two reasons: direct
reads go straight to where the weights are used, and matrix kernels round differently at differently aligned
addresses, so that only then the result equals the plain pipeline's bit for bit. On an accelerator pieces begin at
multiples of 256 bytes and never at 0.

Owns addresses relative to a unit's begin; does not know which unit lies where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.weights.ranges import (
    ALIGNMENT_BYTES,
    CACHE_LINE_BYTES,
    PAGE_BYTES,
    FileRange,
    HostRange,
    Piece,
    align,
)


@dataclass(frozen=True)
class Run:
    """Bytes that follow each other in a file and keep doing so on the device: one read.

    Attributes:
        range: of the file.
        position: in the unit, of the first byte.
    """

    range: FileRange
    position: int


@dataclass(frozen=True)
class Layout:
    """Positions of a unit's pieces.

    Attributes:
        positions: byte offset of each piece, in the order given.
        num_bytes: of the whole, gaps included; a multiple of the alignment of units.
        runs: the pieces that can be read straight to their position, joined.
    """

    positions: tuple[int, ...]
    num_bytes: int
    runs: tuple[Run, ...] = ()


def packed(pieces: Sequence[Piece]) -> Layout:
    """The layout for an accelerator, and for the host memory that is copied to it as a whole."""
    positions, cursor = [], ALIGNMENT_BYTES
    runs: list[Run] = []
    for piece in pieces:
        positions.append(cursor)
        if is_direct(piece):
            place = _range(piece)
            before = (
                runs.pop() if runs and _goes_on(runs[-1], place, cursor) else Run(replace(place, num_bytes=0), cursor)
            )
            runs.append(
                replace(before, range=replace(before.range, num_bytes=before.range.num_bytes + place.num_bytes))
            )
        cursor = align(cursor + piece.num_bytes, ALIGNMENT_BYTES)
    return Layout(tuple(positions), cursor, tuple(runs))


def _goes_on(run: Run, place: FileRange, position: int) -> bool:
    """Whether a range follows a run in the file, and as closely on the device."""
    end = run.range.offset + run.range.num_bytes
    return run.range.file == place.file and place.offset == end and position == run.position + run.range.num_bytes


def paged(pieces: Sequence[Piece], is_shared: bool = False) -> Layout:
    """The layout for the CPU: pieces from files in runs of whole pages, the others at cache lines before them.

    Args:
        pieces: of the unit.
        is_shared: lay it out alike on all ranks, wherever their memory has the pieces.
    """
    positions = [0] * len(pieces)
    cursor = ALIGNMENT_BYTES
    for number, piece in enumerate(pieces):
        if not is_direct(piece):
            cursor = align(cursor, CACHE_LINE_BYTES) + (0 if is_shared else _skew(piece))
            positions[number] = cursor
            cursor += piece.num_bytes
    runs = []
    for members in _joined(pieces):
        cursor = align(cursor, PAGE_BYTES)
        first = _range(pieces[members[0]])
        position = cursor + first.offset % PAGE_BYTES
        for number in members:
            positions[number] = position + _range(pieces[number]).offset - first.offset
        end = max(_range(pieces[number]).offset + pieces[number].num_bytes for number in members)
        runs.append(Run(FileRange(first.file, first.offset, end - first.offset), position))
        cursor = position + end - first.offset
    return Layout(tuple(positions), align(cursor, PAGE_BYTES), tuple(runs))


def is_direct(piece: Piece) -> bool:
    """Whether a piece can be read from its file to its place without a step between."""
    place = piece.range
    return piece.cast is None and isinstance(place, FileRange) and place.offset % piece.itemsize == 0


def _range(piece: Piece) -> FileRange:
    assert isinstance(piece.range, FileRange)
    return piece.range


def _skew(piece: Piece) -> int:
    """Where in a cache line a weight in memory lies; what is cast is made anew, at the begin of one."""
    if piece.cast is not None or not isinstance(piece.range, HostRange):
        return 0
    skew = piece.range.memory.data_ptr() % CACHE_LINE_BYTES
    return skew if skew % piece.itemsize == 0 else 0


def _joined(pieces: Sequence[Piece]) -> list[list[int]]:
    """The numbers of direct pieces, in the order of their files, split where a page or more lies between."""
    order = sorted(
        (number for number, piece in enumerate(pieces) if is_direct(piece)),
        key=lambda number: (str(_range(pieces[number]).file), _range(pieces[number]).offset),
    )
    groups: list[list[int]] = []
    end, file = 0, None
    for number in order:
        place = _range(pieces[number])
        if file == place.file and place.offset - end < PAGE_BYTES:
            groups[-1].append(number)
        else:
            groups.append([number])
            end = 0
        file, end = place.file, max(end, place.offset + place.num_bytes)
    return groups

"""Weights in shards: each of several ranks has an equal part of a unit's bytes, and they gather them into its place.

    unit:  | part of rank 0 | part of rank 1 | ... |      parts are whole pages (or cache lines of an accelerator)

A part is cut without regard to tensors and dtypes: one gathering moves a unit, whatever it is made of. Owns how a unit
is cut; does not know how ranks exchange, or which unit is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from penstock.weights.layout import Layout, Run
from penstock.weights.ranges import Cast, FileRange, HostRange, Piece, Range, align
from penstock.weights.sources import Part, Source, SourceKind


class Sharers(Protocol):
    """The ranks that hold a unit together, as this one sees them."""

    @property
    def rank(self) -> int:
        """This process among them."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def all_gather_into(self, parts: torch.Tensor, tensor: torch.Tensor, is_async: bool = False) -> object:
        """Fill `parts` with every rank's `tensor`, in rank order; all ranks call it in the same order.

        Args:
            parts: contiguous.
            tensor: contiguous; it may be a part of `parts`.
            is_async: only begin.

        Returns:
            What to wait for; None where it is done, or in the order of the device's current stream.
        """
        ...


def padded(layout: Layout, size: int, alignment: int) -> Layout:
    """The layout of a unit that so many ranks can share evenly, in parts of whole `alignment`s."""
    return replace(layout, num_bytes=align(layout.num_bytes, size * alignment))


@dataclass(frozen=True)
class Cut:
    """A part of a unit, as if it were a unit of its own.

    Attributes:
        pieces: what of each piece lies in the part.
        layout: where, from the part's begin.
    """

    pieces: tuple[Piece, ...]
    layout: Layout


def cut(pieces: Sequence[Piece], layout: Layout, begin: int, end: int) -> Cut:
    """The bytes of a unit from `begin` to `end`.

    Args:
        pieces: of the unit.
        layout: of the unit.
        begin: a multiple of the size of every element.
        end: the same.
    """
    found = list(_cut_pieces(pieces, layout.positions, begin, end))
    runs = tuple(_cut_runs(layout.runs, begin, end))
    positions = tuple(position for _, position in found)
    return Cut(tuple(piece for piece, _ in found), Layout(positions, end - begin, runs))


def _cut_pieces(pieces: Sequence[Piece], positions: Sequence[int], begin: int, end: int) -> Iterator[tuple[Piece, int]]:
    for piece, position in zip(pieces, positions, strict=True):
        first, last = max(position, begin), min(position + piece.num_bytes, end)
        if first < last:
            part = _range(piece.range, piece.cast, first - position, last - position)
            yield replace(piece, range=part), first - begin


def _cut_runs(runs: Sequence[Run], begin: int, end: int) -> Iterator[Run]:
    for run in runs:
        first, last = max(run.position, begin), min(run.position + run.range.num_bytes, end)
        if first < last:
            skipped = first - run.position
            yield Run(FileRange(run.range.file, run.range.offset + skipped, last - first), first - begin)


def _range(place: Range, cast: Cast | None, begin: int, end: int) -> Range:
    """A part of a range, whose begin and end are counted as the bytes lie on the device."""
    if cast is not None:
        begin = begin // cast.wanted.itemsize * cast.stored.itemsize
        end = end // cast.wanted.itemsize * cast.stored.itemsize
    if isinstance(place, FileRange):
        return FileRange(place.file, place.offset + begin, end - begin)
    if isinstance(place, HostRange):
        return HostRange(place.memory[begin:end])
    return replace(place, num_bytes=end - begin)


class ShardSource:
    """A unit whose bytes the ranks have in parts.

    Args:
        own: this rank's part, at the positions that it has from the part's begin.
        sharers: the ranks.
        num_bytes: of the whole unit; a multiple of the number of ranks.

    Attributes:
        kind: where this rank's part is.
        parts: the work of bringing this rank's part to its place; the rest is the gathering.
    """

    def __init__(self, own: Source, sharers: Sharers, num_bytes: int) -> None:
        self.own = own
        self.sharers = sharers
        self.num_bytes = num_bytes
        self.kind: SourceKind = own.kind

    @property
    def part_bytes(self) -> int:
        """Bytes of each rank's part."""
        return self.num_bytes // self.sharers.size

    @property
    def begin(self) -> int:
        """Where in the unit this rank's part begins."""
        return self.part_bytes * self.sharers.rank

    @property
    def parts(self) -> Sequence[Part]:
        """What brings this rank's part."""
        return self.own.parts

    def check(self) -> None:
        """Check this rank's part."""
        self.own.check()


def written_bytes(source: Source) -> int:
    """Bytes that a fill from a source writes to the device: what this rank brings, and what it gathers."""
    own = sum(part.num_bytes for part in source.parts)
    return own + source.num_bytes - source.part_bytes if isinstance(source, ShardSource) else own

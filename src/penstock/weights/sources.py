"""What fills a unit's place on the device: its own files, or memory of the host.

A source is cut into parts that any thread can carry out in any order. Sources write to host memory; how that becomes
the device's is the transfer's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from penstock.weights.layout import Layout, is_direct
from penstock.weights.ranges import PAGE_BYTES, Cast, FileRange, HostRange, Piece
from penstock.weights.reader import FileReader

PART_BYTES = 8 * 2**20
"""The most that one part fills: large enough for a disk's full speed, small enough for several threads."""

SourceKind = Literal["file", "host", "file+host", "unread"]


@dataclass(frozen=True)
class Part:
    """A piece of a source's work.

    Attributes:
        position: in the unit, of the first byte written.
        num_bytes: how many.
        write: fills the memory it is given, margins included; may be called on any thread, any number of times.
        margin: bytes before and after that `write` may use as well, and leaves undefined: whole pages of a file. In a
            layout of whole pages nothing else lies there; elsewhere a part is to be written apart from the others.
    """

    position: int
    num_bytes: int
    write: Callable[[memoryview], None]
    margin: tuple[int, int] = (0, 0)


class Source(Protocol):
    """Where a unit's bytes come from."""

    kind: SourceKind

    @property
    def parts(self) -> Sequence[Part]:
        """All of the work, in the order of the unit's bytes."""
        ...

    def check(self) -> None:
        """Refuse a source whose bytes are no longer what they were.

        Raises:
            WeightsError: for a file that vanished or changed.
        """
        ...


class FileSource:
    """The checkpoint's own files: nothing is converted beforehand, and nothing is written."""

    kind: SourceKind = "file"

    def __init__(self, pieces: Sequence[Piece], layout: Layout, reader: FileReader) -> None:
        self._reader = reader
        self._files = {piece.range.file for piece in pieces if isinstance(piece.range, FileRange)}
        for file in self._files:
            reader.open(file)  # from here on, another file in its place is noticed
        parts = [part for run in layout.runs for part in _range_parts(run.range, run.position, reader, in_pages=True)]
        in_runs = bool(layout.runs)
        for piece, position in zip(pieces, layout.positions, strict=True):
            if not isinstance(piece.range, FileRange) or (in_runs and is_direct(piece)):
                continue
            if piece.cast is None:
                parts.extend(_range_parts(piece.range, position, reader))
            else:
                parts.extend(_cast_parts(piece.range, piece.cast, position, reader))
        self.parts: Sequence[Part] = sorted(parts, key=lambda part: part.position)

    def check(self) -> None:
        """Refuse files that vanished or changed; costs one `stat` per file."""
        for file in self._files:
            self._reader.check(file)


class HostSource:
    """Weights that are in host memory: those that were cast, made or changed after loading."""

    kind: SourceKind = "host"

    def __init__(self, pieces: Sequence[Piece], layout: Layout) -> None:
        parts: list[Part] = []
        for piece, position in zip(pieces, layout.positions, strict=True):
            if isinstance(piece.range, HostRange):
                parts.extend(_memory_parts(piece.range.memory, piece.cast, position))
        self.parts: Sequence[Part] = parts

    def check(self) -> None:
        """Memory does not change behind our back."""


class MixedSource:
    """Some of a unit in files, some in memory, such as a block with an adapter."""

    kind: SourceKind = "file+host"

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self.parts: Sequence[Part] = sorted(
            (part for source in sources for part in source.parts), key=lambda part: part.position
        )

    def check(self) -> None:
        """Check all of them."""
        for source in self._sources:
            source.check()


def source_of(pieces: Sequence[Piece], layout: Layout, reader: FileReader) -> Source:
    """The source of a unit with these pieces at these positions."""
    has_files = any(isinstance(piece.range, FileRange) for piece in pieces)
    has_memory = any(isinstance(piece.range, HostRange) for piece in pieces)
    if has_files and has_memory:
        return MixedSource([FileSource(pieces, layout, reader), HostSource(pieces, layout)])
    return FileSource(pieces, layout, reader) if has_files else HostSource(pieces, layout)


def _range_parts(place: FileRange, position: int, reader: FileReader, in_pages: bool = False) -> Iterator[Part]:
    """Cuts at whole pages of the file; in a run of whole pages, every part can so be read directly."""
    begin = place.offset
    end = place.offset + place.num_bytes
    while begin < end:
        cut = min((begin + PART_BYTES) // PAGE_BYTES * PAGE_BYTES, end)
        part = FileRange(place.file, begin, cut - begin)
        margin = (begin % PAGE_BYTES, -cut % PAGE_BYTES) if in_pages else (0, 0)
        yield Part(position + begin - place.offset, part.num_bytes, partial(_read, reader, part, margin), margin)
        begin = cut


def _read(reader: FileReader, place: FileRange, margin: tuple[int, int], memory: memoryview) -> None:
    has_margin = len(memory) == margin[0] + place.num_bytes + margin[1]
    reader.read(place, memory, margin if has_margin else (0, 0))


def _cast_parts(place: FileRange, cast: Cast, position: int, reader: FileReader) -> Iterator[Part]:
    step = _step(cast)
    for begin in range(0, place.num_bytes, step):
        part = FileRange(place.file, place.offset + begin, min(step, place.num_bytes - begin))
        begins_at = position + begin // cast.stored.itemsize * cast.wanted.itemsize
        num_bytes = part.num_bytes // cast.stored.itemsize * cast.wanted.itemsize
        yield Part(begins_at, num_bytes, partial(_read_cast, reader, part, cast))


def _step(cast: Cast) -> int:
    """How many stored bytes make one part: neither they nor what becomes of them is more than a part may have."""
    return PART_BYTES // max(cast.stored.itemsize, cast.wanted.itemsize) * cast.stored.itemsize


def _read_cast(reader: FileReader, place: FileRange, cast: Cast, memory: memoryview) -> None:
    stored = bytearray(place.num_bytes)
    reader.read(place, memoryview(stored))
    _cast_into(torch.frombuffer(stored, dtype=cast.stored), cast, memory)


def _memory_parts(memory: torch.Tensor, cast: Cast | None, position: int) -> Iterator[Part]:
    ratio = (1, 1) if cast is None else (cast.wanted.itemsize, cast.stored.itemsize)
    step = PART_BYTES if cast is None else _step(cast)
    for begin in range(0, memory.numel(), step):
        stored = memory[begin : begin + step]
        begins_at = position + begin * ratio[0] // ratio[1]
        num_bytes = stored.numel() * ratio[0] // ratio[1]
        yield Part(begins_at, num_bytes, partial(_copy, stored, cast))


def _copy(stored: torch.Tensor, cast: Cast | None, memory: memoryview) -> None:
    if cast is None:
        torch.frombuffer(memory, dtype=torch.uint8).copy_(stored)
    else:
        _cast_into(stored.view(cast.stored), cast, memory)


def _cast_into(stored: torch.Tensor, cast: Cast, memory: memoryview) -> None:
    torch.frombuffer(memory, dtype=torch.uint8).view(cast.wanted).copy_(stored)

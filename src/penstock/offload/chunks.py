"""A ring of pinned chunks between files and a device, and what goes into a chunk.

Ranges of files keep the place within a page that they have in their file, so that they are read directly; what follows
each other in a chunk and on the device is one copy. Owns the chunks; does not know streams.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from penstock.weights.memory import HostMemory
from penstock.weights.ranges import PAGE_BYTES, align
from penstock.weights.sources import PART_BYTES, Part

_NUM_CHUNKS = 4
_CHUNK_BYTES = 2 * PART_BYTES


@dataclass
class Chunk:
    """Pinned memory.

    Attributes:
        memory: it.
        copied: the event behind the last copies from it; None before any.
    """

    memory: HostMemory
    copied: Any = None


class Chunks:
    """The ring.

    Args:
        make_memory: makes pinned memory of so many bytes.
        num_threads: that each hold one chunk at a time.
    """

    def __init__(self, make_memory: Callable[[int], HostMemory], num_threads: int) -> None:
        num_chunks = max(_NUM_CHUNKS, 2 * num_threads)
        self.memories = [make_memory(_CHUNK_BYTES + 2 * PAGE_BYTES) for _ in range(num_chunks)]
        self._free: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        for memory in self.memories:
            self._free.put(Chunk(memory))

    @contextmanager
    def taken(self) -> Iterator[Chunk]:
        """A chunk whose last copies are over; it goes back to the ring in any case."""
        chunk = self._free.get()
        try:
            if chunk.copied is not None:
                chunk.copied.synchronize()
            yield chunk
        finally:
            self._free.put(chunk)

    def close(self) -> None:
        """Give the memory back; nobody holds a chunk any more."""
        for memory in self.memories:
            memory.close()


@dataclass
class Copy:
    """Bytes that follow each other in a chunk and in a unit.

    Attributes:
        offset: in the chunk.
        position: in the unit.
        num_bytes: how many.
    """

    offset: int
    position: int
    num_bytes: int


class Group:
    """Parts of a unit that fit a chunk together.

    Attributes:
        copies: from the chunk to the unit's place.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Part, int]] = []  # and where in the chunk each begins, margins left out
        self.copies: list[Copy] = []
        self._end = 0

    @property
    def num_bytes(self) -> int:
        """That are copied, small gaps between parts included."""
        return sum(copy.num_bytes for copy in self.copies)

    def add(self, part: Part) -> bool:
        """Put a part behind those that are there; False where it does not fit. One alone always does."""
        before, after = part.margin
        last = self.copies[-1] if self.copies else None
        gap = part.position - (last.position + last.num_bytes) if last is not None else -1
        begins_page = before or after or part.num_bytes >= PAGE_BYTES
        if 0 <= gap < PAGE_BYTES and not begins_page and last is not None:
            offset = last.offset + last.num_bytes + gap
        else:
            offset, last = align(self._end, PAGE_BYTES) + before, None
        if self._parts and offset + part.num_bytes + after > _CHUNK_BYTES:
            return False
        self._parts.append((part, offset))
        self._end = offset + part.num_bytes + after
        previous = self.copies[-1] if self.copies and gap == 0 else None
        if previous is not None and offset == previous.offset + previous.num_bytes:
            last = previous
        if last is None:
            self.copies.append(Copy(offset, part.position, part.num_bytes))
        else:
            last.num_bytes = offset + part.num_bytes - last.offset
        return True

    def write(self, memory: memoryview) -> None:
        """Fill the chunk."""
        for part, offset in self._parts:
            before, after = part.margin
            part.write(memory[offset - before : offset + part.num_bytes + after])


def groups(parts: Sequence[Part]) -> list[Group]:
    """What to read into one chunk after the other, in the order of the parts."""
    found: list[Group] = []
    for part in parts:
        if not found or not found[-1].add(part):
            found.append(Group())
            found[-1].add(part)
    return found

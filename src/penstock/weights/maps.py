"""Which file lies behind an address of this process.

`from_pretrained` leaves weights of the stored dtype mapped from their checkpoint: address leads to file and offset,
and the weight can be read again from there at any time. What was written to since (a merged adapter) is a private
copy of its page and no longer what the file says: it counts as memory.

Source: proc(5), on /proc/PID/maps, smaps and pagemap. Elsewhere than on Linux nothing is found, and all weights
count as memory.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from penstock.errors import WeightsError
from penstock.weights.index import ITEM_BYTES, TensorRecord, read_header
from penstock.weights.ranges import FileRange, align

_ENTRY_BYTES = 8  # of one page in pagemap
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61


@dataclass(frozen=True)
class _Region:
    begin: int
    end: int
    offset: int
    file: Path
    is_written: bool


class MappedFiles:
    """The files that are mapped into this process at the moment of construction.

    Which of them are safetensors files tells their header, not their name: in the hub's cache the name is a hash.
    """

    def __init__(self) -> None:
        self._regions = sorted(_regions(), key=lambda region: region.begin)
        self._records: dict[Path, dict[int, TensorRecord]] = {}

    @cached_property
    def _begins(self) -> list[int]:
        return [region.begin for region in self._regions]

    def locate(self, address: int, num_bytes: int, dtype: torch.dtype) -> FileRange | None:
        """The file range that a tensor's memory still equals, or None.

        Cross-checked with the file's header: the bytes must be those of one tensor of this item size.
        """
        index = bisect.bisect_right(self._begins, address) - 1
        if index < 0 or num_bytes == 0:
            return None
        region = self._regions[index]
        if address + num_bytes > region.end or (region.is_written and _has_private_page(address, num_bytes)):
            return None
        offset = region.offset + address - region.begin
        record = self._record_at(region.file, offset)
        if record is None or offset + num_bytes > record.offset + record.num_bytes:
            return None
        if ITEM_BYTES.get(record.dtype) != dtype.itemsize:
            return None
        return FileRange(region.file, offset, num_bytes)

    def _record_at(self, file: Path, offset: int) -> TensorRecord | None:
        if file not in self._records:
            try:
                self._records[file] = {record.offset: record for record in read_header(file) if record.num_bytes}
            except (WeightsError, OSError):  # another kind of file, or replaced since: what is in memory counts
                self._records[file] = {}
        records = self._records[file]
        if offset in records:
            return records[offset]
        below = [begin for begin in records if begin < offset]  # a view into a tensor
        return records[max(below)] if below else None


def give_back(memories: list[torch.Tensor]) -> int:
    """Free what was written to in mapped files, and is not needed any more; returns the bytes.

    A file's mapping ends as a whole: the pages of a tensor that is gone, and that were changed, stay. Freed, they would
    read as the file again. So this is done to whole pages only, of memory whose storage nobody else has.

    Args:
        memories: not needed any more; the list is emptied.
    """
    regions = [region for region in _regions() if region.is_written]
    libc: Any = ctypes.CDLL(None) if regions else None
    num_bytes = 0
    while memories:
        memory = memories.pop()
        address, storage = memory.data_ptr(), memory.untyped_storage()
        begin = align(address, mmap.PAGESIZE)
        end = (address + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        del memory
        count: Any = torch._C
        if begin >= end or count._storage_Use_Count(storage._cdata) > 1:
            continue
        if any(region.begin <= begin and end <= region.end for region in regions):
            failed = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
            num_bytes += 0 if failed else end - begin
    return num_bytes


def _regions() -> Iterator[_Region]:
    """The regions of smaps that map a file which is still the one on disk."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    fields: list[str] = []
    for line in smaps.read_text("utf-8", "surrogateescape").splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0] and not words[0].endswith(":"):
            fields = words
        elif words[0] == "Anonymous:" and len(fields) == 6 and fields[5].startswith("/"):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            file = Path(fields[5])
            if _inode(file) == int(fields[4]):
                yield _Region(begin, end, int(fields[2], 16), file, is_written=int(words[1]) > 0)


def _inode(file: Path) -> int | None:
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_ino if stat.S_ISREG(state.st_mode) else None


def _has_private_page(address: int, num_bytes: int) -> bool:
    """Whether a page of a private mapping was written to, and so no longer is the file's."""
    first, last = address // mmap.PAGESIZE, (address + num_bytes - 1) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as stream:
        stream.seek(first * _ENTRY_BYTES)
        raw = stream.read((last - first + 1) * _ENTRY_BYTES)
    for at in range(0, len(raw), _ENTRY_BYTES):
        entry = int.from_bytes(raw[at : at + _ENTRY_BYTES], "little")
        is_present = bool(entry >> 63)
        if entry & _SWAPPED or (is_present and not entry & _OF_FILE):
            return True
    return False


def file_identity(file: Path | int) -> tuple[int, int, int]:
    """What tells that a file is still the same: inode, bytes, time of the last change in nanoseconds.

    Args:
        file: its path, or an open descriptor.

    Raises:
        OSError: where it has gone.
    """
    state = os.stat(file)
    return state.st_ino, state.st_size, state.st_mtime_ns

"""Reads byte ranges of checkpoint files into memory that is given; any thread may call it.

`preadv` releases the GIL, so that readers work beside compute. Direct reads (O_DIRECT) go past the page cache, at a
tenth of the CPU's time, and are right where the cache could not hold the files anyway. Where the memory that is given
does not lie as they need it, they go through pages of the reader's thread, with a copy more. A file system without them
is read in the usual way, and what was so read is counted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import WeightsError
from penstock.weights.index import REDO
from penstock.weights.maps import file_identity
from penstock.weights.ranges import PAGE_BYTES, FileRange, align

_DIRECT: int = getattr(os, "O_DIRECT", 0)
_THROUGH_BYTES = 2**20


@dataclass(frozen=True)
class _Open:
    """Descriptors of a file; `direct` is None where it is only read in the usual way."""

    buffered: int
    direct: int | None
    identity: tuple[int, int, int]


_LIVING: weakref.WeakSet[FileReader] = weakref.WeakSet()  # those whose locks a fork may have caught


class FileReader:
    """Open checkpoint files, and how many bytes were read from them.

    Args:
        is_direct: read past the page cache where the file system can.

    Attributes:
        read_bytes: bytes read so far, rounded to whole pages for direct reads.
        cached_bytes: of these, read through the page cache although direct reads were asked for.
    """

    def __init__(self, is_direct: bool = False) -> None:
        self._is_direct = is_direct
        self._lock = threading.Lock()
        self._files: dict[Path, _Open] = {}
        self.read_bytes = self.cached_bytes = 0
        self._pages = threading.local()
        weakref.finalize(self, _close_all, self._files)
        _LIVING.add(self)

    def open(self, file: Path) -> None:
        """Open a file, once, and remember its identity.

        Raises:
            WeightsError: where it cannot be opened.
        """
        with self._lock:
            if file in self._files:
                return
            try:
                buffered = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise WeightsError(f"{file}: cannot be read: {error.strerror}. {REDO}") from error
            self._files[file] = _Open(buffered, self._open_direct(file), file_identity(buffered))

    def _open_direct(self, file: Path) -> int | None:
        if not self._is_direct or not _DIRECT:
            return None
        try:
            return os.open(file, os.O_RDONLY | _DIRECT)
        except OSError:  # a file system without direct reads
            return None

    def check(self, file: Path) -> None:
        """Refuse a file that is not the one that was opened.

        Raises:
            WeightsError: where it has vanished or changed since.
        """
        self.open(file)
        identity = self._files[file].identity
        try:
            now = file_identity(file)
        except OSError as error:
            raise WeightsError(
                f"{file}: vanished while its weights are streamed ({error.strerror}). Put it back and load again."
            ) from error
        if now != identity:
            raise WeightsError(
                f"{file}: changed while its weights are streamed ({identity[1]} bytes before, {now[1]} now). "
                "Load the pipeline again."
            )

    def read(self, place: FileRange, target: memoryview, margin: tuple[int, int] = (0, 0)) -> int:
        """Fill `target` with a range of a file.

        Args:
            place: what to read.
            target: writable memory around the place of the bytes, margins included.
            margin: bytes of `target` before and after the range that may be overwritten; with margins that make
                address, offset and length multiples of a page the read is direct.

        Returns:
            Bytes read.

        Raises:
            WeightsError: for a file that ends too soon, or cannot be read.
        """
        self.open(place.file)
        file = self._files[place.file]
        before, after = margin
        if file.direct is None or not place.num_bytes:
            return self._read(file, place, target[before : before + place.num_bytes])
        is_aligned = (place.offset - before) % PAGE_BYTES == 0 and (
            place.offset + place.num_bytes + after
        ) % PAGE_BYTES == 0
        if is_aligned and _address(target) % PAGE_BYTES == 0:
            wide = FileRange(place.file, place.offset - before, before + place.num_bytes)
            return self._read(file, wide, target[: before + place.num_bytes + after], file.direct)
        return self._read_through_pages(file, place, target[before : before + place.num_bytes])

    def _read_through_pages(self, file: _Open, place: FileRange, target: memoryview) -> int:
        """Read directly, whole pages at a time, into memory of this thread, and copy from there."""
        if not hasattr(self._pages, "memory"):
            self._pages.memory = memoryview(mmap.mmap(-1, _THROUGH_BYTES))
        memory: memoryview = self._pages.memory
        done = num_read = 0
        while done < place.num_bytes:
            skipped = (place.offset + done) % PAGE_BYTES
            count = min(place.num_bytes - done, _THROUGH_BYTES - skipped)
            wide = FileRange(place.file, place.offset + done - skipped, skipped + count)
            num_read += self._read(file, wide, memory[: align(skipped + count, PAGE_BYTES)], file.direct)
            target[done : done + count] = memory[skipped : skipped + count]
            done += count
        return num_read

    def _read(self, file: _Open, place: FileRange, target: memoryview, direct: int | None = None) -> int:
        """Read a range, and as much behind it as the target has room for; directly with a descriptor for that."""
        descriptor, done, cached = file.buffered if direct is None else direct, 0, 0
        while done < place.num_bytes:
            try:
                got = os.preadv(descriptor, [target[done:]], place.offset + done)
            except OSError as error:
                if descriptor == direct and error.errno == errno.EINVAL:
                    descriptor = file.buffered  # the rest of a short read is no multiple, or the file system refuses
                    continue
                raise WeightsError(f"{place.file}: cannot be read: {error.strerror}. {REDO}") from error
            if got == 0:
                missing = place.num_bytes - done
                raise WeightsError(
                    f"{place.file}: ends at byte {place.offset + done}, {missing} bytes too soon. {REDO}"
                )
            done += got
            cached += got if descriptor != direct else 0
        with self._lock:
            self.read_bytes += done
            self.cached_bytes += cached if self._is_direct else 0
        return done

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            _close_all(self._files)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _close_all(files: dict[Path, _Open]) -> None:
    while files:
        _, file = files.popitem()
        os.close(file.buffered)
        if file.direct is not None:
            os.close(file.direct)


def _after_fork() -> None:
    for reader in list(_LIVING):
        reader._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)

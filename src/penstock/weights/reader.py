"""Reads byte ranges of checkpoint files into memory that is given; any thread may call it.

`preadv` releases the GIL, so that readers work beside compute. Direct reads (O_DIRECT) go past the page cache, at a
tenth of the CPU's time, and are right where the cache could not hold the files anyway; a file system without them is
read in the usual way.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from penstock.errors import WeightsError
from penstock.weights.index import REDO
from penstock.weights.maps import file_identity
from penstock.weights.ranges import PAGE_BYTES, FileRange

_DIRECT: int = getattr(os, "O_DIRECT", 0)
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EPERM)


class FileReader:
    """Open checkpoint files, and how many bytes were read from them.

    Args:
        is_direct: read past the page cache where the file system can.

    Attributes:
        read_bytes: bytes read so far, rounded to whole pages for direct reads.
    """

    def __init__(self, is_direct: bool = False) -> None:
        self._is_direct = is_direct and _DIRECT != 0
        self._lock = threading.Lock()
        self._files: dict[Path, tuple[int, bool, tuple[int, int, int]]] = {}
        self._buffered_files: dict[Path, int] = {}  # for what cannot be read directly of files opened so
        self.read_bytes = 0

    def open(self, file: Path) -> None:
        """Open a file, once, and remember its identity.

        Raises:
            WeightsError: where it cannot be opened.
        """
        with self._lock:
            if file in self._files:
                return
            try:
                identity = file_identity(file)
                if self._is_direct:
                    try:
                        self._files[file] = (os.open(file, os.O_RDONLY | _DIRECT), True, identity)
                        return
                    except OSError as error:
                        if error.errno not in _UNSUPPORTED:
                            raise
                self._files[file] = (os.open(file, os.O_RDONLY), False, identity)
            except OSError as error:
                raise WeightsError(f"{file}: cannot be read: {error.strerror}. {REDO}") from error

    def check(self, file: Path) -> None:
        """Refuse a file that is not the one that was opened.

        Raises:
            WeightsError: where it has vanished or changed since.
        """
        self.open(file)
        identity = self._files[file][2]
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
        descriptor, is_direct, _ = self._files[place.file]
        before, after = margin
        offset, needed = place.offset - before, before + place.num_bytes
        length = needed + after
        if not is_direct or offset % PAGE_BYTES or length % PAGE_BYTES:
            if is_direct:
                descriptor = self._buffered(place.file)
            offset, needed, length, target = place.offset, place.num_bytes, place.num_bytes, target[before:]
        done = 0
        try:
            while done < needed:
                got = os.preadv(descriptor, [target[done:length]], offset + done)
                if got == 0:
                    raise WeightsError(
                        f"{place.file}: ends at byte {offset + done}, {needed - done} bytes too soon. {REDO}"
                    )
                done += got
                if done < needed and is_direct and done % PAGE_BYTES:
                    descriptor = self._buffered(place.file)  # a short direct read leaves an odd rest
        except OSError as error:
            raise WeightsError(f"{place.file}: cannot be read: {error.strerror}. {REDO}") from error
        with self._lock:
            self.read_bytes += done
        return done

    def _buffered(self, file: Path) -> int:
        with self._lock:
            if file not in self._buffered_files:
                self._buffered_files[file] = os.open(file, os.O_RDONLY)
            return self._buffered_files[file]

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in (*(entry[0] for entry in self._files.values()), *self._buffered_files.values()):
                os.close(descriptor)
            self._files.clear()
            self._buffered_files.clear()

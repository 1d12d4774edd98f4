"""The files of finished jobs: in a folder, in a bucket of an S3-compatible service, or in memory, by URL.

Owns their names, which hold nothing that a client wrote, and that a half-written one is never seen. Does not know jobs.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, S3Store

from penstock.errors import ConfigError, PenstockError
from penstock.server.threads import DATABASE, FILES

_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "video/mp4": ".mp4",
    "audio/wav": ".wav",
}
_NAME = re.compile(r"[0-9a-f]{32}(\.[a-z0-9]{1,8})?")
_LEFTOVER = re.compile(_NAME.pattern + r"#[0-9]+")  # as the local store calls a file until it is whole
_LEFTOVER_AGE_S = 3600  # since it was last written to
_PART_BYTES = 8 * 1024**2
_NUM_PARTS = 4  # on their way at once
_CHUNK_BYTES = 4 * 1024**2
_CHECK_S = 30
_FAILURES = (BaseError, OSError, NotImplementedError, ValueError)


class StorageError(PenstockError, OSError):
    """The storage did not do what it was told; the message says what it answered."""


class FileRangeError(PenstockError, ValueError):
    """A range of a file that it does not have.

    Attributes:
        size: bytes of the whole file.
    """

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class Files:
    """Where the files of jobs are kept.

    Args:
        url: `file:///folder` (made where it is missing), `s3://bucket/prefix` or `memory:`. Of S3, the usual
            environment says more: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION. There,
            uploads that a dead server left unfinished are removed by a lifecycle rule of the bucket.
        begin: is told each name before the file is written (`Store.begin_file`), so that a file which no job came to
            have can be found; blocks, and runs in a thread.
        abandon: is told the name of a file that was begun and may not be whole (`Store.abandon_file`).

    Raises:
        ConfigError: for a URL that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        begin: Callable[[str], None] | None = None,
        abandon: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._url = url
        self._begin = begin
        self._abandon = abandon
        self._store, self._folder = _opened(url)
        self._takes_attributes = self._folder is None

    @property
    def folder(self) -> Path | None:
        """Where they are on this machine; None for a bucket, and for memory."""
        return self._folder

    async def check(self) -> None:
        """Write, read and remove a file, and remove what dead servers left half-written.

        Raises:
            ConfigError: where that fails.
        """
        name, content = f"{secrets.token_hex(16)}.bin", b"penstock"
        try:
            async with asyncio.timeout(_CHECK_S):
                await obstore.put_async(self._store, name, content)
                found = await obstore.get_async(self._store, name)
                whole = bytes(await found.bytes_async()) == content
                await obstore.delete_async(self._store, name)
                await self.remove_leftovers()
        except _FAILURES as error:
            raise ConfigError(
                f"the storage {self._url} cannot be used: {_reason(error)}. "
                "Check that it is there and may be written, or give another with --storage."
            ) from error
        if not whole:
            raise ConfigError(f"the storage {self._url} does not give back what it takes. Give another with --storage.")

    async def put(self, path: str | Path, media_type: str) -> str:
        """Keep a copy of a file.

        Args:
            path: of the file, on this machine.
            media_type: what it is.

        Returns:
            The name it is kept under; new, and nobody can guess it.

        Raises:
            StorageError: where it cannot be read or kept; then nothing is.
            StoreError: where `begin` fails.

        Cost: a few parts of it are in memory at a time; it appears at once when it is complete.
        """
        name = secrets.token_hex(16) + _SUFFIXES.get(media_type, ".bin")
        if self._begin is not None:
            await DATABASE.run(self._begin, name)
        is_whole = False
        try:
            await obstore.put_async(
                self._store,
                name,
                Path(path),
                attributes={"Content-Type": media_type} if self._takes_attributes else None,
                chunk_size=_PART_BYTES,
                max_concurrency=_NUM_PARTS,
            )
            is_whole = True
        except _FAILURES as error:
            raise self._failure(error) from error
        finally:
            if not is_whole:
                self._abandon(name)
        return name

    async def get(
        self, name: str, start: int | None = None, end: int | None = None
    ) -> tuple[int, AsyncIterator[bytes]]:
        """A file, or a part of one.

        Args:
            name: as `put` gave it; anything else has no file.
            start: its first byte, from 0.
            end: the byte after its last; one after the file's end means the file's end.

        Returns:
            The bytes of the whole file, and the asked ones in chunks; a StorageError may be raised between them.

        Raises:
            FileNotFoundError: where there is none.
            FileRangeError: where it has no byte of that range.
            StorageError: where it cannot be read.

        Cost: a chunk is in memory at a time, and read when it is asked for, however slowly.
        """
        if not _NAME.fullmatch(name):
            raise FileNotFoundError(f"{name[:80]!r} is no file of this storage.")
        try:
            size = (await obstore.head_async(self._store, name))["size"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{name} is not in the storage: it has expired, or was removed.") from None
        except _FAILURES as error:
            raise self._failure(error) from error
        first, last = start or 0, size if end is None else min(end, size)
        if not 0 <= first < last and (start is not None or end is not None):
            raise FileRangeError(f"a file of {size} bytes has none from {first} to {end}. Ask for less.", size)
        return size, self._chunks(name, first, last)

    async def delete(self, name: str) -> None:
        """Remove a file; one that is not there is fine.

        Raises:
            StorageError: where it cannot be removed.
        """
        if not _NAME.fullmatch(name):
            return
        try:
            await obstore.delete_async(self._store, name)
        except FileNotFoundError:
            return
        except _FAILURES as error:
            raise self._failure(error) from error

    async def remove_leftovers(self) -> int:
        """Remove what dead servers left half-written in a folder: nothing has written to it for an hour.

        Returns:
            How many files.

        Raises:
            OSError: where one cannot be removed.
        """
        if self._folder is None:
            return 0
        return await FILES.run(_remove_leftovers, self._folder)

    async def _chunks(self, name: str, first: int, last: int) -> AsyncIterator[bytes]:
        for start in range(first, last, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, last)
            try:
                chunk = bytes(await obstore.get_range_async(self._store, name, start=start, end=end))
            except _FAILURES as error:
                raise self._failure(error) from error
            yield chunk

    def _failure(self, error: Exception) -> StorageError:
        return StorageError(f"the storage {self._url} failed: {_reason(error)}. Look at its space and its own log.")


def _opened(url: str) -> tuple[ObjectStore, Path | None]:
    """The store of a URL, and its folder where it is one."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(_words(url)) from error
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(_words(url.partition(":")[0] + ":..."))
    if parts.scheme == "memory" and not parts.netloc and parts.path in ("", "/"):
        return MemoryStore(), None
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        folder = Path(unquote(parts.path))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return LocalStore(folder), folder
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the folder {folder} cannot be made: {_reason(error)}. Give another --storage."
            ) from error
    if parts.scheme == "s3" and parts.netloc:
        return _bucket(parts.netloc, parts.path.strip("/")), None
    raise ConfigError(_words(url))


def _bucket(name: str, prefix: str) -> S3Store:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return S3Store(
            name,
            prefix=prefix or None,
            client_options={"allow_http": endpoint.lower().startswith("http://"), "connect_timeout": "5s"},
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)},
        )
    except _FAILURES as error:
        raise ConfigError(
            f"the bucket {name} cannot be used: {_reason(error)}. Check the AWS_ variables of the environment."
        ) from error


def _remove_leftovers(folder: Path) -> int:
    count, before = 0, time.time() - _LEFTOVER_AGE_S
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _LEFTOVER.fullmatch(entry.name):
                continue
            try:
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    os.unlink(entry.path)
                    count += 1
            except FileNotFoundError:
                continue  # it became whole, or another server removed it
    return count


def _words(url: str) -> str:
    return f"{url!r} is no place for files. Give file:///folder, s3://bucket/prefix or memory:."


def _reason(error: Exception) -> str:
    """What the storage said, in one line: obstore adds what it looked like inside."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer for {_CHECK_S} seconds"
    lines = (str(error) or type(error).__name__).splitlines()
    return lines[0].strip().rstrip(".")

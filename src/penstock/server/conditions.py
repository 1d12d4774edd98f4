"""Whether new work can be kept: room where files go, and a database file that is still the one that was opened.

Owns what is looked at, how often, and what a client and the log are told. Does not know jobs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from penstock.bytesize import format_bytes
from penstock.server.failures import ApiError
from penstock.server.threads import FILES

LOOK_S = 5.0
"""Seconds between two looks while nobody asks for anything."""

_STORAGE, _LOST, _DATABASE = "storage_full", "storage_lost", "database_lost"


class Conditions:
    """Looks whether there is room and a record for new work.

    Args:
        database: the file of the record, which is there; None where it is no file.
        folders: on this machine, in which files are written.
        least_bytes: that must be free in each of them; 0 does not look.

    Attributes:
        problems: code to words, as `/health` shows them; empty where all is well.
    """

    def __init__(self, database: Path | None, folders: Sequence[Path], least_bytes: int) -> None:
        self._database = database
        self._identity = _identity(database)
        self._folders = folders
        self._least_bytes = least_bytes
        self._log = structlog.get_logger()
        self.problems: dict[str, str] = {}

    def require(self) -> None:
        """Refuse new work where the last look found that it could not be kept.

        Raises:
            ApiError: 507 without room, 503 without folders or a record; clients that try again by
                themselves are told not to.
        """
        if _STORAGE in self.problems:
            message = "the server has no room for what would be made, and makes nothing. Ask again once it has."
            raise ApiError(507, message, code=_STORAGE)
        if _LOST in self.problems:
            message = "the server cannot write its files, and makes nothing. Its log says what is to be done."
            raise ApiError(503, message, code=_LOST)
        if _DATABASE in self.problems:
            message = "the server has lost its record of jobs, and makes nothing. Its log says what is to be done."
            raise ApiError(503, message, code=_DATABASE)

    async def look(self) -> None:
        """See how it stands, and tell the log of what has changed."""
        found = await FILES.run(self._found)
        for code, text in found.items():
            if code not in self.problems:
                self._log.error("no new work is taken", code=code, reason=text)
        for code in self.problems.keys() - found.keys():
            self._log.info("new work is taken again", code=code)
        self.problems = found

    async def watch(self) -> None:
        """Look again and again, until this is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    def _found(self) -> dict[str, str]:
        found = {}
        if _identity(self._database) != self._identity:  # SQLite goes on in a file that has no name any more
            found[_DATABASE] = (
                f"the database's file {self._database} was removed or replaced, and what is recorded goes nowhere. Put "
                "the very file back, or start the server again: it begins with the file that is there, or a new one."
            )
        for folder in self._folders:
            if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
                found[_LOST] = (
                    f"{folder} is no folder that this server can write to. Make it again, or start the server again."
                )
            elif self._least_bytes and (lacking := _lacking(folder, self._least_bytes)):
                found[_STORAGE] = lacking
        return found


def _identity(file: Path | None) -> tuple[int, int] | None:
    """Which file has a name; None where none has."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found is not None else None


def _lacking(folder: Path, least_bytes: int) -> str | None:
    """What a folder's disk lacks, in words."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return f"{folder} cannot be looked at: {error.strerror}. Make it again."
    free = disk.f_bavail * disk.f_frsize
    if free < least_bytes:
        return (
            f"{format_bytes(free)} are free in {folder}, less than {format_bytes(least_bytes)} (--min-free-space). "
            "Remove something, or lower --max-storage."
        )
    if disk.f_files and not disk.f_favail:
        return f"the disk of {folder} takes no more files, whatever their size. Remove some."
    return None

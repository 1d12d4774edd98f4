"""What has had its time is removed: the files first, then the record, so that no file is left without one.

Owns the order, and the cap on bytes. Does not know when it is called, databases or storages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.server.job import Job
from penstock.server.threads import DATABASE

_BATCH = 100


class Records(Protocol):
    """What is asked of the store; see `Store`."""

    def expired(self, now: int) -> list[Job]:
        """Finished jobs whose time is over."""

    def oldest_finished(self, limit: int) -> list[Job]:
        """Finished jobs that hold bytes, the one that ended first in front."""

    def total_bytes(self) -> int:
        """Bytes of the files of all jobs."""

    def delete(self, id: str) -> bool:
        """Forget a job."""

    def begun_files(self) -> list[str]:
        """Names of files that a former life of this server began, and that no job has."""

    def forget_files(self, names: list[str]) -> None:
        """Say that begun files are no more."""


class Removals(Protocol):
    """What is asked of the storage; see `Files`."""

    async def delete(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""

    async def remove_leftovers(self) -> int:
        """Remove what dead servers left half-written."""


@dataclass(kw_only=True)
class Swept:
    """What a sweep removed.

    Attributes:
        num_expired: jobs whose time was over.
        num_pressed_out: finished jobs that had to make room.
        num_bytes: of their files.
        num_orphans: files that no job had.
        failures: files that the storage did not remove; their records stay for the next sweep.
    """

    num_expired: int = 0
    num_pressed_out: int = 0
    num_bytes: int = 0
    num_orphans: int = 0
    failures: list[str]


async def sweep(store: Records, files: Removals, now: int, max_bytes: int) -> Swept:
    """Remove expired jobs; then the oldest finished ones, until the files of all take at most a number of bytes.

    Args:
        store: has the records.
        files: has the files.
        now: seconds since the epoch.
        max_bytes: of all files together; what unfinished jobs hold counts, and stays.

    Returns:
        What was removed. A file that cannot be removed keeps its record, and does not keep others.

    Raises:
        StoreError: where the database fails.

    Cost: the store's methods run in threads; many servers may sweep the same at once.
    """
    swept = Swept(failures=[])
    for job in await DATABASE.run(store.expired, now):
        if await _remove_files(job, files, swept):
            swept.num_expired += await _forget(job, store, swept)
    excess = await DATABASE.run(store.total_bytes) - max_bytes
    stuck: set[str] = set()
    while excess > 0:
        oldest = await DATABASE.run(store.oldest_finished, _BATCH + len(stuck))
        batch = [job for job in oldest if job.id not in stuck]
        if not batch:
            break
        for job in batch:
            if excess <= 0:
                break
            if await _remove_files(job, files, swept):
                swept.num_pressed_out += await _forget(job, store, swept)
                excess -= _bytes_of(job)
            else:
                stuck.add(job.id)
    await _remove_orphans(store, files, swept)
    return swept


async def _remove_files(job: Job, files: Removals, swept: Swept) -> bool:
    """Whether all of them are gone."""
    for file in job.files:
        try:
            await files.delete(file.name)
        except OSError as error:
            swept.failures.append(f"{file.name} of {job.id}: {error}")
            return False
    return True


async def _forget(job: Job, store: Records, swept: Swept) -> bool:
    """Remove the record of a job without files; False where another server was faster."""
    if not await DATABASE.run(store.delete, job.id):
        return False
    swept.num_bytes += _bytes_of(job)
    return True


async def _remove_orphans(store: Records, files: Removals, swept: Swept) -> None:
    """Files that a server wrote, or half wrote, and did not live to record."""
    gone = []
    for name in await DATABASE.run(store.begun_files):
        try:
            await files.delete(name)
            gone.append(name)
        except OSError as error:
            swept.failures.append(f"{name} of no job: {error}")
    if gone:
        await DATABASE.run(store.forget_files, gone)
    swept.num_orphans = len(gone)
    try:
        swept.num_orphans += await files.remove_leftovers()
    except OSError as error:
        swept.failures.append(f"half-written files: {error}")


def _bytes_of(job: Job) -> int:
    return sum(file.num_bytes for file in job.files)

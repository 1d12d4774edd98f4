"""How jobs stand and how they ended is written down; where the database fails, their ends are written later.

Owns the ends that are not written yet: until then this server knows them by heart. Does not know runs or the engine.
"""

from __future__ import annotations

from typing import Any

import structlog

from penstock.server.endings import FIELDS
from penstock.server.job import Job
from penstock.server.keeping import Keeping
from penstock.server.store import Store, StoreError
from penstock.server.threads import DATABASE


class Recording:
    """Writes what becomes of jobs.

    Args:
        store: the record.
        keeping: lets go of files whose job was ended or deleted elsewhere.

    Attributes:
        unrecorded: jobs whose end is not written yet, by id.
    """

    def __init__(self, store: Store, keeping: Keeping) -> None:
        self._store = store
        self._keeping = keeping
        self._log = structlog.get_logger()
        self.unrecorded: dict[str, Job] = {}

    async def note(self, job_id: str, changes: dict[str, Any]) -> None:
        """Write what has changed of an unfinished job; only once."""
        try:
            await DATABASE.run(lambda: self._store.update(job_id, **changes))
        except StoreError as error:  # the end of the job is recorded again and again; this is not
            self._log.warning("progress could not be recorded", job=job_id, error=str(error))

    async def end(self, job: Job) -> None:
        """Write how a job ended."""
        values = {name: getattr(job, name) for name in FIELDS}
        try:
            recorded = await DATABASE.run(lambda: self._store.update(job.id, **values))
            found = recorded or await DATABASE.run(self._store.get, job.id)
        except StoreError as error:
            self._log.error("the end of a job could not be recorded yet", job=job.id, error=str(error))
            self.unrecorded[job.id] = job
            return
        self.unrecorded.pop(job.id, None)
        if found is None or not found.files:  # it was ended or deleted elsewhere, and has no use for them
            await self._keeping.discard(job.files)

    async def end_all(self) -> None:
        """Write the ends that could not be written before."""
        for job in list(self.unrecorded.values()):
            await self.end(job)

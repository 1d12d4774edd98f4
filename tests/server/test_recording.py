"""What becomes of jobs is written down, later where the database fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from penstock.server.job import JobFile
from penstock.server.recording import Recording
from penstock.server.store import Store, StoreError
from tests.server.jobs import a_job


class Keeping:
    """Notes what it is to let go of."""

    def __init__(self) -> None:
        self.gone: list[str] = []

    async def discard(self, files: Any) -> None:
        self.gone += [file.name for file in files]


def test_an_end_is_written_once_the_database_works(tmp_path: Path) -> None:
    store, keeping = Store(f"sqlite:///{tmp_path}/jobs.db", server="alpha"), Keeping()
    recording = Recording(store, keeping)  # type: ignore[arg-type]
    file = JobFile(name="f" * 32 + ".png", role="result", media_type="image/png", num_bytes=1)
    job, other = (a_job(id=name, status="completed", progress=100, files=(file,)) for name in ("one", "two"))
    store.create(a_job(id="one"))
    update, is_down = store.update, [True]

    def failing(id: str, **values: Any) -> Any:
        if is_down[0]:
            raise StoreError("it is away")
        return update(id, **values)

    store.update = failing  # type: ignore[method-assign]

    async def main() -> None:
        await recording.note("one", {"progress": 5})
        await recording.end(job)
        assert recording.unrecorded == {"one": job}
        is_down[0] = False
        await recording.end_all()
        await recording.end(other)  # which was deleted meanwhile

    asyncio.run(main())
    found = store.get("one")
    assert found is not None and found.status == "completed" and recording.unrecorded == {}
    assert keeping.gone == [file.name]
    store.close()

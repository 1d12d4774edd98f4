"""What ranks have made moves into the storage, and out of it again.

Owns the way of a file from a run's folder to its name in the storage. Does not know how a job ends, or its record.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from penstock.server.files import Files, StorageError
from penstock.server.job import JobFile
from penstock.server.runs import Run
from penstock.server.store import StoreError
from penstock.server.threads import CODING, DATABASE
from penstock.wire import MadeFile

if TYPE_CHECKING:
    from penstock.server.metrics import Metrics

_FACTS = ("width", "height", "num_frames", "frame_rate", "sampling_rate_hz")
_SMALL = "image/webp"


class Begun(Protocol):
    """What is asked of the store; see `Store`."""

    def abandon_file(self, name: str) -> None:
        """Say that a begun file will come to no job."""

    def forget_files(self, names: Iterable[str]) -> None:
        """Say that begun files are no more."""


class Keeping:
    """Keeps results, and lets them go.

    Args:
        files: the storage.
        begun: knows of the files that no job has.
        metrics: measure it.
    """

    def __init__(self, files: Files, begun: Begun, metrics: Metrics) -> None:
        self._files = files
        self._begun = begun
        self._metrics = metrics

    async def keep(self, run: Run, made: MadeFile) -> None:
        """Move a result into the storage, with its small pictures, and tell of it.

        Raises:
            StorageError: where the storage fails.
            StoreError: where the database, which is told of each file, fails.
        """
        begun_s = time.monotonic()
        encoding = asyncio.create_task(self._encode(run, made))
        try:
            await self._put(run, made)
        finally:
            await encoding
        self._metrics.keep_s.observe(time.monotonic() - begun_s)
        run.tell({"type": "kept", "item": made.item})

    async def _encode(self, run: Run, made: MadeFile) -> None:
        if run.wants_contents:
            run.contents[made.item] = await CODING.run(_base64, made.path)

    async def _put(self, run: Run, made: MadeFile) -> None:
        facts = {name: getattr(made, name) for name in _FACTS if getattr(made, name) is not None}
        places = [("result", made.path, made.media_type), ("thumbnail", made.thumbnail, _SMALL)]
        for role, path, media_type in [*places, ("spritesheet", made.spritesheet, _SMALL)]:
            if not path:
                continue
            num_bytes = Path(path).stat().st_size
            name = await self._files.put(Path(path), media_type)
            file = JobFile(name=name, role=role, media_type=media_type, num_bytes=num_bytes, item=made.item)
            run.kept.append(replace(file, seed=made.seed, facts=facts) if role == "result" else file)

    async def remove(self, files: Iterable[JobFile]) -> None:
        """Remove files.

        Raises:
            StorageError: where one cannot be removed; those before it are gone.
            StoreError: where the database fails.
        """
        names = [file.name for file in files]
        for name in names:
            await self._files.delete(name)
        if names:
            await DATABASE.run(self._begun.forget_files, names)

    async def discard(self, files: Iterable[JobFile]) -> None:
        """Remove files that no job has; what cannot be removed now, a later sweep removes."""
        for file in files:
            try:
                await self.remove([file])
            except (StorageError, StoreError) as error:
                self._begun.abandon_file(file.name)
                structlog.get_logger().error("a file could not be removed yet", file=file.name, error=str(error))


def _base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")

"""What ranks have made moves into the storage, and out of it again.

Owns the way of a file from a run's folder to its name in the storage. Does not know how a job ends, or its record.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from anyio import to_thread

from penstock.server.files import Files, StorageError
from penstock.server.job import JobFile
from penstock.server.runs import Run
from penstock.wire import MadeFile

if TYPE_CHECKING:
    from penstock.server.metrics import Metrics

_FACTS = ("width", "height", "num_frames", "frame_rate", "sampling_rate_hz")
_SMALL = "image/webp"


class Keeping:
    """Keeps results, and lets them go.

    Args:
        files: the storage.
        metrics: measure it.
    """

    def __init__(self, files: Files, metrics: Metrics) -> None:
        self._files = files
        self._metrics = metrics

    async def keep(self, run: Run, made: MadeFile) -> None:
        """Move a result into the storage, with its small pictures, and tell of it.

        Raises:
            StorageError: where the storage fails.
            StoreError: where the database, which is told of each file, fails.
        """
        begun_s = time.monotonic()
        if run.wants_contents:
            run.contents[made.item] = await to_thread.run_sync(_base64, made.path)
        facts = {name: getattr(made, name) for name in _FACTS if getattr(made, name) is not None}
        places = [("result", made.path, made.media_type), ("thumbnail", made.thumbnail, _SMALL)]
        for role, path, media_type in [*places, ("spritesheet", made.spritesheet, _SMALL)]:
            if not path:
                continue
            num_bytes = Path(path).stat().st_size
            name = await self._files.put(Path(path), media_type)
            file = JobFile(name=name, role=role, media_type=media_type, num_bytes=num_bytes, item=made.item)
            run.kept.append(replace(file, seed=made.seed, facts=facts) if role == "result" else file)
        self._metrics.keep_s.observe(time.monotonic() - begun_s)
        run.tell({"type": "kept", "item": made.item})

    async def discard(self, files: Iterable[JobFile]) -> None:
        """Remove files; those that stay belong to no job, and are removed by a later sweep."""
        for file in files:
            try:
                await self._files.delete(file.name)
            except StorageError as error:
                structlog.get_logger().error("a file could not be removed yet", file=file.name, error=str(error))


def _base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")

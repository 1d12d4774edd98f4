"""What a server does by itself: it removes what expires, fails what dead servers were at, and minds its own life.

Owns when that is done, and that a failure of one part ends neither the others nor the next time. Does not know how it
is done, or what follows where the server cannot go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import structlog

from penstock.errors import EngineError, NotReadyError, PenstockError, QueueFullError
from penstock.server.database import LeaseLostError
from penstock.server.endings import fail_dead
from penstock.server.expiry import sweep
from penstock.server.files import Files
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from penstock.server.threads import DATABASE, WAITING

if TYPE_CHECKING:
    from penstock.engine.engine import Engine

SWEEP_S = 30.0
LEASE_S = 5.0
WATCH_S = 0.3

Work = Callable[[], Awaitable[None]]


class Upkeep:
    """The upkeep of one server.

    Args:
        settings: limits.
        engine: is watched.
        store: has the records, and the server's name.
        files: has what was made.
        fail: is told why the server cannot go on: its engine has failed for good, or another has its name.
    """

    def __init__(
        self,
        settings: ServeConfig,
        *,
        engine: Engine,
        store: Store,
        files: Files,
        fail: Callable[[PenstockError], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._files = files
        self._fail = fail
        self._log = structlog.get_logger()
        self._told: dict[int, str] = {}  # group to what was last said of it

    async def run(self, *more: Work) -> None:
        """Do all of it, until it is cancelled; `more` is done before each sweep."""
        await asyncio.gather(
            self._again(SWEEP_S, *more, self.fail_dead, self._sweep),
            self._again(LEASE_S, self.hold_name),
            self._again(WATCH_S, self.watch_engine),
        )

    async def _again(self, every_s: float, *works: Work) -> None:
        while True:
            for work in works:
                (problem,) = await asyncio.gather(work(), return_exceptions=True)  # a boundary: whatever it raises
                if problem is not None:
                    self._log.error("upkeep failed, and is tried again", error=str(problem), exc_info=_defect(problem))
            await asyncio.sleep(every_s)

    async def fail_dead(self) -> None:
        """Fail what other servers were at that are no more."""
        count = await DATABASE.run(fail_dead, self._store, self._settings)
        if count:
            self._log.warning("jobs of dead servers have failed", num_jobs=count)

    async def _sweep(self) -> None:
        swept = await sweep(self._store, self._files, int(time.time()), self._settings.storage_bytes)
        for failure in swept.failures:
            self._log.error("what has expired could not be removed yet", error=failure)

    async def hold_name(self) -> None:
        """Take the server's name again where the database has lost it; end the server where another has it."""
        try:
            if await DATABASE.run(self._store.hold_name):
                self._log.warning("the database had lost this server's name; it was taken again")
        except LeaseLostError as error:
            await self._fail(error)

    async def watch_engine(self) -> None:
        """Log why groups of ranks do not run; end the server where none ever will."""
        status = await WAITING.run(self._engine.status)
        for group in status.groups:
            trouble = group.message if group.state in ("restarting", "failed") else ""
            if trouble and self._told.get(group.number) != trouble:
                self._log.error("ranks do not run", group=group.number, state=group.state, reason=trouble)
            self._told[group.number] = trouble
        if self._engine.description is None:
            return  # it never began: whoever waits for that is told why
        if status.groups and all(group.state == "failed" for group in status.groups):
            reason = self._refusal() or status.groups[0].message or "the engine has ended"
            reason = reason.rstrip(".")
            await self._fail(
                EngineError(f"no ranks run any more: {reason}. Look at the log, and start penstock again.")
            )

    def _refusal(self) -> str:
        """Why the engine takes no work, in its own words."""
        try:
            self._engine.require_room()
        except NotReadyError as error:
            return str(error)
        except QueueFullError:
            pass
        return ""


def _defect(problem: BaseException) -> Any:
    """What the log shows the traceback of: not what was foreseen."""
    return None if isinstance(problem, PenstockError) else problem

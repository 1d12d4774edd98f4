"""The life cycle of jobs: accepted, followed, kept, recorded, and removed only once the ranks have let go.

Owns what this server has under way, and every change of a job's record. Runs in the event loop; the store, files and
encodings work in threads. Does not know routes, fields of requests, or what the pipeline takes.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from penstock.errors import EngineError, PenstockError
from penstock.request import GenerationRequest, OutputKind
from penstock.server.endings import WORDS, ending, fail_lost
from penstock.server.failures import STOPPING_RETRY_S, ApiError, of_failure, stopping
from penstock.server.files import Files
from penstock.server.job import UNFINISHED, Job
from penstock.server.keeping import Keeping
from penstock.server.recording import Recording
from penstock.server.runs import Run
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from penstock.server.threads import DATABASE, FILES, WAITING
from penstock.server.upkeep import Upkeep
from penstock.wire import Began, Checked, Ended, Failure, Made, Order, Step

if TYPE_CHECKING:
    from penstock.engine.engine import Engine
    from penstock.server.metrics import Metrics

T = TypeVar("T")

CHECK_S = 30.0
DELETE_S = 60.0
NOTE_S = 1.0  # between two notes of a job's progress in the store
STOP_S = 3.0  # for ranks to reach their next step, before they are ended


class Jobs:
    """What this server makes, and what it has made.

    Args:
        settings: limits.
        engine: makes it.
        store: records it.
        files: keeps it.
        metrics: count it.
        server: name of this server in the records.

    Attributes:
        server: likewise.
        is_stopping: no new work is taken.
        problem: why this server cannot go on; None where it can.
    """

    def __init__(
        self,
        settings: ServeConfig,
        *,
        engine: Engine,
        store: Store,
        files: Files,
        metrics: Metrics,
        server: str,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._keeping = Keeping(files, store, metrics)
        self._upkeep = Upkeep(settings, engine=engine, store=store, files=files, fail=self._fail)
        self._metrics = metrics
        self.server = server
        self._log = structlog.get_logger()
        self._runs: dict[str, Run] = {}
        self._recording = Recording(store, self._keeping)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_stages = 1
        self._stopping: asyncio.Task[None] | None = None
        self._refusal: str | None = None
        self.is_stopping = False
        self.problem: PenstockError | None = None

    @property
    def num_unfinished(self) -> int:
        """Jobs that wait or run here."""
        return len(self._runs)

    async def start(self) -> None:
        """Fail what this server was at when it last ended, and what dead ones were at; begin the upkeep.

        Raises:
            ConfigError: where another server of this name is running.
            StoreError: where the database fails.
        """
        try:
            lost = await DATABASE.run(fail_lost, self._store, self._settings)
            await self._upkeep.fail_dead()
        except PenstockError as error:
            self.problem = error
            raise
        if lost:
            self._log.warning("jobs of the former server have failed", num_jobs=lost)
        self._spawn(self._upkeep.run(self._recording.end_all))

    def check_open(self) -> None:
        """Refuse new work where the server is about to leave.

        Raises:
            ApiError: 503.
        """
        if self.is_stopping:
            raise stopping()
        if self._refusal is not None:
            raise ApiError(503, self._refusal, code="not_ready", retry_after_s=STOPPING_RETRY_S)

    async def _fail(self, problem: PenstockError) -> None:
        """Take no more work; where the engine is what failed, end its jobs with that reason."""
        if self.is_stopping or self._refusal is not None:
            return
        self._log.error("the server cannot go on", error=str(problem))
        self._refusal = "the server cannot go on, and ends. Ask again once it was started anew; its log says why."
        if isinstance(problem, EngineError):
            await self._await_ends()  # the engine's last words may be on their way
            for run in list(self._runs.values()):
                self._give_up(run, Failure(code="rank_died", message="no ranks run any more. Ask again later."))
        self.problem = problem

    async def check(self, request: GenerationRequest) -> Checked:
        """Ask the pipeline whether it takes a request, before it is accepted; what it would make.

        Raises:
            ApiError: 400 naming the field; 503 where nobody can be asked.
        """
        self.check_open()
        try:
            checked = await asyncio.wait_for(asyncio.wrap_future(self._engine.check(request)), CHECK_S)
        except TimeoutError:
            message = f"no rank answered within {CHECK_S:g} s whether it takes the request. Try again."
            raise ApiError(503, message, code="not_ready", retry_after_s=5) from None
        if checked.failure is not None:
            raise of_failure(checked.failure)
        return checked

    async def begin(
        self, job: Job, order: Order, *, wants_contents: bool = False, client: dict[str, Any] | None = None
    ) -> Run:
        """Let a job wait for ranks, and record it; its folder exists, and is the run's from here on where there is one.

        The engine is asked first: what its queue refuses leaves no record, and nothing is promised before there is one.

        Args:
            job: as it begins; its id is the order's.
            order: for the engine.
            wants_contents: whether the run shall keep the bytes of its results for its caller.
            client: what the log says of who asked.

        Raises:
            QueueFullError: where too many wait.
            NotReadyError: where there are no ranks.
            StoreError: where it cannot be recorded; then the order is cancelled.
        """
        self.check_open()
        run = Run(job, order, wants_contents=wants_contents, num_stages=self._num_stages)
        run.client = client or {}
        self._engine.submit(order, run.hear)
        self._runs[job.id] = run
        self._metrics.running.set(len(self._runs))
        recording = self._spawn(self._record_and_follow(run))
        try:
            await asyncio.shield(recording)
        except asyncio.CancelledError:  # whoever asked is gone: the run is recorded, followed, and ended all the same
            recording.add_done_callback(lambda task: task.cancelled() or task.exception())
            self.cancel(run, "client_left")
            raise
        return run

    async def _record_and_follow(self, run: Run) -> None:
        """A run that the engine has is followed to its end, whatever becomes of its record."""
        is_recorded = False
        try:
            await DATABASE.run(self._store.create, run.job)
            is_recorded = True
        finally:
            if not is_recorded:
                self.cancel(run, "deleted")
            self._follow(run, is_recorded=is_recorded)

    def run_of(self, job_id: str) -> Run | None:
        """The run of a job that this server is at."""
        return self._runs.get(job_id)

    def position(self, job: Job) -> tuple[int, float] | None:
        """How many are before a job in the queue, and about how many seconds; None where it does not wait here."""
        return self._engine.position(job.id) if job.status == "queued" and job.id in self._runs else None

    async def get(self, job_id: str, owner: str, kind: OutputKind | None = None) -> Job:
        """A job as it is now.

        Raises:
            ApiError: 404 where there is none of that id, kind and owner.
            StoreError: where the database fails.
        """
        job: Job | None
        if job_id in self._runs:
            job = self._runs[job_id].job
        else:
            job = self._recording.unrecorded.get(job_id) or await DATABASE.run(self._store.get, job_id, owner)
        if job is None or job.owner != owner or (kind is not None and job.kind != kind):
            message = f"there is no {kind or 'job'} {job_id[:80]!r}: it never was, has expired, or was deleted."
            raise ApiError(404, message, code="not_found", param="id")
        return job

    async def list(
        self, owner: str, kind: OutputKind | None, *, limit: int, after: str | None, order: str
    ) -> tuple[list[Job], bool]:
        """A page of an owner's jobs, and whether there are more.

        Raises:
            UnknownJobError: for an `after` that is not among them.
            StoreError: where the database fails.
        """
        jobs, has_more = await DATABASE.run(
            lambda: self._store.list(owner, kind, limit, after, "asc" if order == "asc" else "desc")
        )
        return [self._now(job) for job in jobs], has_more

    def _now(self, job: Job) -> Job:
        run = self._runs.get(job.id)
        return run.job if run else self._recording.unrecorded.get(job.id, job)

    def cancel(self, run: Run, reason: str) -> None:
        """End a run at its next step; `is_over` follows once all ranks have let go.

        Args:
            run: which.
            reason: client_left, stopped, deleted or server_stopped.
        """
        run.cancel_reason = run.cancel_reason or reason
        self._engine.cancel(run.job.id)

    async def end(self, job: Job, reason: str) -> Job:
        """Cancel a job where it is unfinished, and wait until its ranks have let go; the job as it is then.

        Args:
            job: which.
            reason: deleted, or stopped: then what is finished of it stays.

        Raises:
            ApiError: 409 for an unfinished job of another server; 503 where the ranks do not let go in time.
        """
        run = self._runs.get(job.id)
        if run is not None:
            self.cancel(run, reason)
            try:
                await asyncio.wait_for(run.is_over.wait(), DELETE_S)
            except TimeoutError:
                message = f"{job.id} is being cancelled, and its ranks are not at their next step yet. Try again."
                raise ApiError(503, message, code="cancelling", retry_after_s=5) from None
            return run.job
        if job.id not in self._recording.unrecorded and job.status in UNFINISHED:
            message = f"{job.id} is made by another server ({job.server}), which alone can cancel it. Ask that one."
            raise ApiError(409, message, code="other_server")
        return job

    async def delete(self, job: Job) -> None:
        """Cancel a job where it is unfinished, wait until its ranks have let go, then remove files and record.

        Raises:
            ApiError: 409 for an unfinished job of another server; 503 where the ranks do not let go in time.
            StorageError: where a file cannot be removed; the record stays, so that it can be tried again.
            StoreError: where the database fails.
        """
        job = await self.end(job, "deleted")
        await self._keeping.remove(job.files)
        await DATABASE.run(self._store.delete, job.id)
        self._recording.unrecorded.pop(job.id, None)

    async def stop(self) -> None:
        """Take no more work, end what runs with a reason, close the engine; idempotent, and callers share the wait."""
        if self._stopping is None:
            self.is_stopping = True
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        for run in self._runs.values():
            self.cancel(run, "server_stopped")
        await self._await_ends()
        await WAITING.run(self._engine.close)  # its last words end the runs that are left
        await self._await_ends()
        for run in list(self._runs.values()):
            self._give_up(run, Failure(code="server_stopped", message=WORDS["server_stopped"]))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._recording.end_all()

    async def _await_ends(self) -> None:
        waits = [asyncio.create_task(run.is_over.wait()) for run in self._runs.values()]
        if waits:
            await asyncio.wait(waits, timeout=STOP_S)

    # ---- a run, from its first event to its last

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _follow(self, run: Run, *, is_recorded: bool = True) -> None:
        task = self._spawn(self._hear(run, is_recorded))
        task.add_done_callback(lambda task: self._settle(run, task))

    def _settle(self, run: Run, task: asyncio.Task[None]) -> None:
        """Nobody waits for ever for a run whose follower has failed, which is a defect."""
        if run.is_over.is_set():
            return
        error = None if task.cancelled() else task.exception()
        self._log.error("a run was not followed to its end", job=run.job.id, exc_info=error)
        self._engine.cancel(run.job.id)
        message = "a defect of the server ended this job. Its log says more."
        self._give_up(run, Failure(code="internal_error", message=message))

    def _give_up(self, run: Run, failure: Failure) -> None:
        """End a run without its last event; the record follows later."""
        run.job = replace(run.job, **ending(run, failure, Ended(id=run.job.id), self._settings.ttl_s))
        self._recording.unrecorded[run.job.id] = run.job
        self._leave(run)
        self._spawn(self._clear(run))

    async def _clear(self, run: Run) -> None:
        """Remove a run's folder, with what nobody has kept."""
        await FILES.run(lambda: shutil.rmtree(run.order.folder, ignore_errors=True))

    async def _hear(self, run: Run, is_recorded: bool) -> None:
        noted_s = 0.0
        while True:
            event = await run.heard.get()
            if isinstance(event, Ended):
                return await self._end(run, event, is_recorded)
            if run.is_over.is_set():
                continue  # it was given up, and is at its end
            progress = run.advance(event)
            changes: dict[str, Any] = {} if progress is None else {"progress": progress}
            if isinstance(event, Began):
                changes = {"status": "in_progress", "started_at": time.time()}
            elif isinstance(event, Step):
                self._metrics.steps.inc()
            elif isinstance(event, Made):
                run.made.append(event.file)
                run.saving.append(self._spawn(self._keeping.keep(run, event.file)))
            if changes:
                run.job = replace(run.job, **changes)
            if is_recorded and changes and ("status" in changes or time.monotonic() - noted_s > NOTE_S):
                noted_s = time.monotonic()
                self._spawn(self._recording.note(run.job.id, changes))

    async def _end(self, run: Run, ended: Ended, is_recorded: bool) -> None:
        problems = [one for one in await asyncio.gather(*run.saving, return_exceptions=True) if one is not None]
        if run.is_over.is_set():  # it was given up, for a reason of its own
            return await self._keeping.discard(run.kept)
        failure = ended.failure
        if failure is None and problems:
            self._log.error("files could not be kept", job=run.job.id, exc_info=problems[0])
            message = "it was made, and the storage did not take its files. Ask again later; the server's log says why."
            failure = Failure(code="storage_failed", message=message)
        if failure is None and not is_recorded:
            failure = Failure(code="storage_failed", message="it could not be recorded, so it was given up. Try again.")
        if failure is None and len(run.made) != run.order.request.num_images:
            message = f"{len(run.made)} of {run.order.request.num_images} were made. Ask again; the log says more."
            failure = Failure(code="generation_failed", message=message)
        values = ending(run, failure, ended, self._settings.ttl_s)
        run.job = replace(run.job, **values)
        await self._keeping.discard(file for file in run.kept if file not in run.job.files)
        self._num_stages = max(self._num_stages, run.num_stages)
        recording = [self._recording.end(run.job)] if is_recorded else []
        await asyncio.gather(*recording, self._clear(run))
        self._tell_log(run, ended)
        self._leave(run)

    def _leave(self, run: Run) -> None:
        self._runs.pop(run.job.id, None)
        self._metrics.running.set(len(self._runs))
        run.is_over.set()
        run.tell({"type": "ended"})

    def _tell_log(self, run: Run, ended: Ended) -> None:
        job = run.job
        self._metrics.count(job, ended.timings, run.cancel_reason)
        facts = {"size": job.size, "seed": job.seed, "num_images": run.order.request.num_images, **run.client}
        said = ended.failure.message if ended.failure is not None else job.error_message
        error = {"code": job.error_code, "error": said} if job.error_code else {}
        self._log.info("job", job=job.id, kind=job.kind, status=job.status, **facts, **error, **job.timings)

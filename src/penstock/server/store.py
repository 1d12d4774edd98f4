"""The record of jobs: it outlives the server, and servers may share it.

Owns the states: what a job may become is decided in the statement that changes it, so that of two
threads, processes or servers only one ends it. Does not know how a database is opened, files, HTTP or the engine.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
import structlog

from penstock.errors import PenstockError
from penstock.request import OutputKind
from penstock.server.database import BEGUN, JOBS, LONGEST_ID, Database
from penstock.server.database import StoreError as StoreError
from penstock.server.job import UNFINISHED, Job, JobFile

_MOST_UNFINISHED_PROGRESS = 99
_FIXED = {"id", "kind", "owner", "server", "created_at"}

_Jobs = list[Job]  # within the class, `list` is a method
_Names = list[str]

_FIELDS = [item.name for item in fields(Job)]
_COLUMNS = [JOBS.c[name] for name in _FIELDS]
_PLACE = (JOBS.c.created_at, JOBS.c.number)
_IS_UNFINISHED = JOBS.c.status.in_(UNFINISHED)
_UNREADABLE = (TypeError, ValueError, LookupError, AttributeError)  # what a row raises that we did not write so


class UnknownJobError(PenstockError, LookupError):
    """A listing was to go on after a job that is not in it."""


class Store:
    """The jobs of all servers that share a database; they share the storage of the files as well.

    Every method may be called by any thread, and blocks: not for an event loop's own thread.

    Args:
        url: `sqlite:///path` (the file is made, with its folder) or `postgresql://user:password@host/name`.
        server: name of this server among those that share the database.

    Raises:
        ConfigError: for a database that cannot be opened, or whose tables are of another penstock.
    """

    def __init__(self, url: str, *, server: str) -> None:
        self._server = server
        self._life = secrets.token_hex(16)
        self._abandoned: set[str] = set()
        self._missed_s: dict[str, float] = {}  # servers without a lease, and since when
        self._database = Database(url)

    def create(self, job: Job) -> None:
        """Record a new job.

        Raises:
            StoreError: where the database fails, or has a job of that id.
        """
        with self._database.writing() as connection:
            connection.execute(JOBS.insert().values(_stored({name: getattr(job, name) for name in _FIELDS})))

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job of an id; None where there is none, or where it belongs to another owner.

        Args:
            id: as a client wrote it: anything.
            owner: whose it must be; None: whoever's.

        Raises:
            StoreError: where the database fails.
        """
        if not _is_id(id):
            return None
        with self._database.reading() as connection:
            row = connection.execute(sa.select(*_COLUMNS).where(JOBS.c.id == id, *_of(owner))).first()
        return _job(row) if row else None

    def update(self, id: str, **values: Any) -> Job | None:
        """Change an unfinished job, in one piece.

        Progress never goes back, and is 100 only of completed jobs; a job in progress is not queued again.

        Args:
            id: of the job.
            **values: new values of the fields of `Job`; its `files` replace the former.

        Returns:
            The job as it is now; None where it is completed, failed or gone: then nothing has changed.

        Raises:
            StoreError: where the database fails.
            ValueError: for a field that is none, or never changes.
        """
        wrong = values.keys() - (set(_FIELDS) - _FIXED)
        if wrong or not values:
            raise ValueError(f"{sorted(wrong)} are no fields of a job that change.")
        new = _stored(values)
        if new.get("status") == "completed":
            new["progress"] = 100
        elif "progress" in new:
            progress = min(new["progress"], _MOST_UNFINISHED_PROGRESS)
            new["progress"] = sa.case((JOBS.c.progress > progress, JOBS.c.progress), else_=progress)
        may = JOBS.c.status == "queued" if new.get("status") == "queued" else _IS_UNFINISHED
        with self._database.writing() as connection:
            statement = JOBS.update().where(JOBS.c.id == id, may).values(new).returning(*_COLUMNS)
            row = connection.execute(statement).first()
            if row and values.get("files"):
                names = [file.name for file in values["files"]]
                connection.execute(BEGUN.delete().where(BEGUN.c.name.in_(names)))
        return _job(row) if row else None

    def list(
        self,
        owner: str | None,
        kind: OutputKind | None = None,
        limit: int = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[_Jobs, bool]:
        """A page of jobs, by the time they were created.

        Args:
            owner: whose; None: whoever's.
            kind: only these; None: all.
            limit: most jobs of the page.
            after: id of the last job of the page before; None: the first page.
            order: oldest or newest first.

        Returns:
            The jobs, and whether there are more. Jobs that come or go meanwhile neither repeat nor skip others.

        Raises:
            UnknownJobError: where `after` is no job of this listing.
            StoreError: where the database fails.
        """
        among = [*_of(owner), *([JOBS.c.kind == kind] if kind else [])]
        query = sa.select(*_COLUMNS).where(*among)
        ordered = query.order_by(*(column.asc() if order == "asc" else column.desc() for column in _PLACE))
        with self._database.reading() as connection:
            if after is not None:
                known = sa.select(*_PLACE).where(JOBS.c.id == after, *among)
                last = connection.execute(known).first() if _is_id(after) else None
                if last is None:
                    raise UnknownJobError(f"after={after!r} is no job of this list. Give the last id of a page.")
                place, seen = sa.tuple_(*_PLACE), sa.tuple_(*last)
                ordered = ordered.where(place > seen if order == "asc" else place < seen)
            jobs = [_job(row) for row in connection.execute(ordered.limit(limit + 1))]
        return jobs[:limit], len(jobs) > limit

    def delete(self, id: str) -> bool:
        """Forget a job, finished or not; its files are removed before. False: there was none."""
        with self._database.writing() as connection:
            return connection.execute(JOBS.delete().where(JOBS.c.id == id)).rowcount > 0

    def fail_unfinished(self, code: str, message: str, *, expires_at: int | None = None) -> int:
        """At a start: fail what this server was at when it died. Other servers' jobs go on.

        From here until `close`, no other process can do so under this server's name.

        Args:
            code: why they fail.
            message: the same for the user.
            expires_at: when they are removed; None: never.

        Returns:
            How many they were.

        Raises:
            ConfigError: where a server of this name is running: its jobs are alive.
            StoreError: where the database fails.
        """
        self._database.lease(self._server)
        with self._database.writing() as connection:
            return _fail(connection, self._server, code, message, expires_at)

    def fail_dead(self, code: str, message: str, *, expires_at: int | None = None) -> int:
        """Fail what other servers were at that are no more, and take over the files that they had begun.

        Dead is whose name nobody holds; in PostgreSQL, where it has been so for a while: a living server that lost its
        session takes its name again.

        Args:
            code: why they fail.
            message: the same for the user.
            expires_at: when they are removed; None: never.

        Returns:
            How many jobs failed.

        Raises:
            StoreError: where the database fails.
        """
        jobs = sa.select(JOBS.c.server).where(_IS_UNFINISHED, JOBS.c.server != self._server)
        files = sa.select(BEGUN.c.server).where(BEGUN.c.server != self._server)
        with self._database.reading() as connection:
            names = set(connection.scalars(jobs.union(files)))
        self._missed_s = {name: since_s for name, since_s in self._missed_s.items() if name in names}
        count = 0
        for name in sorted(names):
            with self._database.holding(name) as is_free:
                if not self._is_dead(name, is_free):
                    continue
                with self._database.writing() as connection:
                    count += _fail(connection, name, code, message, expires_at)
                    connection.execute(BEGUN.update().where(BEGUN.c.server == name).values(server=self._server))
        return count

    def _is_dead(self, name: str, is_free: bool) -> bool:
        if not is_free:
            self._missed_s.pop(name, None)
            return False
        now_s = time.monotonic()
        return now_s - self._missed_s.setdefault(name, now_s) >= self._database.grace_s

    @property
    def file(self) -> Path | None:
        """See `Database.file`."""
        return self._database.file

    def hold_name(self) -> bool:
        """See `Database.renew`."""
        return self._database.renew()

    def expired(self, now: int) -> _Jobs:
        """Finished jobs whose time is over; a row that cannot be read is told of in the log, and left out."""
        query = sa.select(*_COLUMNS).where(~_IS_UNFINISHED, JOBS.c.expires_at <= now)
        with self._database.reading() as connection:
            return [*_readable(connection, query.order_by(JOBS.c.number))]

    def total_bytes(self) -> int:
        """Bytes of the files of all jobs."""
        with self._database.reading() as connection:
            return int(connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(JOBS.c.num_bytes), 0))) or 0)

    def oldest_finished(self, limit: int) -> _Jobs:
        """Finished jobs that hold bytes, the one that ended first in front; without rows that cannot be read."""
        query = sa.select(*_COLUMNS).where(~_IS_UNFINISHED, JOBS.c.num_bytes > 0)
        with self._database.reading() as connection:
            ordered = query.order_by(JOBS.c.completed_at.asc().nulls_first(), JOBS.c.number).limit(limit)
            return [*_readable(connection, ordered)]

    def begin_file(self, name: str) -> None:
        """Say that a file of this name is about to be written, before it is: killed in between, a server leaves none.

        The word is kept until the file is among those of a job (`update`), or forgotten.
        """
        with self._database.writing() as connection:
            connection.execute(BEGUN.insert().values(name=name, server=self._server, life=self._life))

    def abandon_file(self, name: str) -> None:
        """Say that a begun file will come to no job, though it may be there; does not block."""
        self._abandoned.add(name)

    def begun_files(self) -> _Names:
        """Names of files that no job has and none will: of this server's former lives, and those that were abandoned.

        The first are known after `fail_unfinished`. Others of this life may yet come to a job, however long it takes.
        """
        abandoned = sorted(self._abandoned)
        if not self._database.is_leased:
            return abandoned
        query = sa.select(BEGUN.c.name).where(BEGUN.c.server == self._server, BEGUN.c.life != self._life)
        with self._database.reading() as connection:
            former = [row.name for row in connection.execute(query.order_by(BEGUN.c.name))]
        return [*former, *(name for name in abandoned if name not in former)]

    def forget_files(self, names: Iterable[str]) -> None:
        """Say that begun files are no more."""
        gone = [*names]
        with self._database.writing() as connection:
            connection.execute(BEGUN.delete().where(BEGUN.c.name.in_(gone)))
        self._abandoned.difference_update(gone)

    def close(self) -> None:
        """Let go of the database; idempotent."""
        self._database.close()


def _fail(connection: sa.Connection, server: str, code: str, message: str, expires_at: int | None) -> int:
    """Fail the unfinished jobs of a server; how many they were."""
    values = {
        "status": "failed",
        "error_code": code,
        "error_message": message,
        "completed_at": int(time.time()),
        "expires_at": expires_at,
    }
    return connection.execute(JOBS.update().where(JOBS.c.server == server, _IS_UNFINISHED).values(values)).rowcount


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a job as columns; JSON has no word for NaN and infinities, and PostgreSQL takes no other."""
    values = {**values, **{name: _finite(values[name]) for name in ("arguments", "timings") if name in values}}
    if "files" not in values:
        return values
    files: tuple[JobFile, ...] = values["files"]
    return {
        **values,
        "files": [_finite(asdict(file)) for file in files],
        "num_bytes": sum(file.num_bytes for file in files),
    }


def _finite(value: Any) -> Any:
    """The same with numbers that are none as null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[Job]:
    """The jobs of a query, without rows that are none: one that something else has spoilt does not hide the others."""
    try:
        yield from [_job(row) for row in connection.execute(query)]
        return
    except _UNREADABLE:
        ids = [*connection.scalars(query.with_only_columns(JOBS.c.id))]
    for id in ids:
        try:
            yield _job(connection.execute(sa.select(*_COLUMNS).where(JOBS.c.id == id)).one())
        except _UNREADABLE as error:
            structlog.get_logger().error("the record of a job cannot be read", job=id, error=repr(error))


def _job(row: sa.Row[Any]) -> Job:
    values = row._asdict()
    return Job(**{**values, "files": tuple(JobFile(**file) for file in values["files"])})


def _of(owner: str | None) -> list[sa.ColumnElement[bool]]:
    return [] if owner is None else [JOBS.c.owner == owner]


def _is_id(text: str) -> bool:
    return len(text) <= LONGEST_ID and text.isascii() and text.isprintable()

"""The database that jobs are recorded in: SQLite or PostgreSQL, by URL.

Owns the tables, their layout's number, connections, and the words for what goes wrong; a password is in none of them.
Does not know what jobs may become.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from penstock.errors import ConfigError, PenstockError

SCHEMA = 1
"""Number of the tables' layout; a database with another one is left alone."""

LONGEST_ID = 64
"""Characters of an id of a job, or of the name of a file."""

_BUSY_S = 30
_CONNECT_S = 10
_LEASE_S = 1.0
_LEASE_POLL_S = 0.02
_GRACE_S = 15.0  # without a lease, until a server counts as dead: PostgreSQL may have ended its session alone
_LOST_S = 60.0  # without the lease, until its own server ends
_LOCK = 0x70656E73746F636B  # of all penstocks in a PostgreSQL database, while tables are made

_METADATA = sa.MetaData()
_SCHEMA = sa.Table("penstock_schema", _METADATA, sa.Column("number", sa.Integer, primary_key=True))
_TEXT = sa.JSON(none_as_null=True)  # what clients write: PostgreSQL's own texts take no NUL, nothing takes surrogates

JOBS = sa.Table(
    "penstock_jobs",
    _METADATA,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(LONGEST_ID), nullable=False, unique=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("server", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),
    sa.Column("model", _TEXT, nullable=False),
    sa.Column("prompt", _TEXT, nullable=False),
    sa.Column("seconds", _TEXT),
    sa.Column("size", _TEXT),
    sa.Column("seed", sa.BigInteger),
    sa.Column("arguments", sa.JSON, nullable=False),
    sa.Column("remixed_from", sa.String(LONGEST_ID)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", _TEXT),
    sa.Column("files", sa.JSON, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("timings", sa.JSON, nullable=False),
    sa.Index("penstock_jobs_by_owner", "owner", "created_at", "number"),
    sa.Index("penstock_jobs_by_expiry", "expires_at"),
    sa.Index("penstock_jobs_by_status", "status", "server"),
)
"""The fields of a `Job`; `number` counts them in the order they came, `num_bytes` is the sum over their files."""

BEGUN = sa.Table(
    "penstock_begun_files",
    _METADATA,
    sa.Column("name", sa.String(LONGEST_ID), primary_key=True),
    sa.Column("server", sa.Text, nullable=False),
    sa.Column("life", sa.String(32), nullable=False),
)
"""Files that no job has yet: they are being written, or were when their server died; `life` tells which."""


class StoreError(PenstockError):
    """The database did not do what it was told; the message says what it answered."""


class LeaseLostError(PenstockError):
    """Another server holds the name that was this one's: both may not go on."""


class Database:
    """Connections to a database whose tables are there. Thread-safe.

    Args:
        url: `sqlite:///path` (the file is made, with its folder) or `postgresql://user:password@host/name`.

    Raises:
        ConfigError: for a database that cannot be opened, or whose tables are of another penstock.
    """

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        # SQLite has one writer at a time: its threads queue here, which is fairer and faster than its own polling.
        self._turn: AbstractContextManager[Any] = Lock() if self._is_sqlite else nullcontext()
        self._lease: int | sa.Connection | None = None
        self._leased = ""
        self._lost_s: float | None = None
        self._engine = _engine(self._url)
        try:
            self._prepare()
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise ConfigError(
                f"the database {self} cannot be opened: {self._reason(error)}. "
                "Check that it is there and may be written, or give another with --database."
            ) from None  # the cause may hold the password
        except ConfigError:
            self._engine.dispose()
            raise

    def __str__(self) -> str:
        """The URL without anything secret."""
        return _shown(self._url)

    @property
    def file(self) -> Path | None:
        """Where it is on this machine; None for one that is no file."""
        return Path(str(self._url.database)) if self._is_sqlite else None

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to ask.

        Raises:
            StoreError: where the database fails.
        """
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A connection in a transaction, which is kept if the block ends well; its first statement must write.

        Raises:
            StoreError: where the database fails; nothing has changed.
        """
        with self._explained(), self._turn, self._engine.begin() as connection:
            yield connection

    @property
    def is_leased(self) -> bool:
        """Whether a name is held."""
        return self._lease is not None

    @property
    def grace_s(self) -> float:
        """For how long a name must have been free before its server counts as dead."""
        return 0.0 if self._is_sqlite else _GRACE_S

    def lease(self, name: str) -> None:
        """Hold a name until `close`, or until the process ends, however it does.

        Raises:
            ConfigError: where another holds it, and does not let go within a second: so long PostgreSQL may take to
                notice that a client is dead.
            StoreError: where the database fails.
        """
        deadline_s = time.monotonic() + _LEASE_S
        while self._lease is None:
            self._lease = self._locked(name)
            if self._lease is None and time.monotonic() > deadline_s:
                raise ConfigError(
                    f"a server named {name!r} is running with the database {self}. "
                    "Give this one another --server-name, or another --database."
                )
            if self._lease is None:
                time.sleep(_LEASE_POLL_S)
            else:
                self._leased = name

    def renew(self) -> bool:
        """Make sure that the leased name is still held: that of PostgreSQL is lost with its session.

        Returns:
            Whether it had been lost, and was taken again.

        Raises:
            LeaseLostError: where another has taken it meanwhile.
            StoreError: where the database fails, or does not give the name back yet: it may not have noticed that the
                former session has ended. Try again.
        """
        if not self._leased or isinstance(self._lease, int):
            return False
        if self._lease is not None:
            try:
                self._lease.scalar(sa.select(1))
                return False
            except SQLAlchemyError:
                self._let_go(self._lease)
                self._lease = None
        self._lease = self._locked(self._leased)
        if self._lease is not None:
            self._lost_s = None
            return True
        self._lost_s = self._lost_s or time.monotonic()
        if time.monotonic() - self._lost_s < _LOST_S:
            raise StoreError(f"the database {self} lost the name {self._leased!r}, and has not let go of it yet.")
        raise LeaseLostError(
            f"the database {self} ended the session that held the name {self._leased!r}, and another server has "
            "taken it. Start this one again with another --server-name."
        )

    @contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Hold another name as long as the block runs; False where somebody holds it already.

        Raises:
            StoreError: where the database fails.
        """
        held = self._locked(name)
        try:
            yield held is not None
        finally:
            if isinstance(held, int):
                Path(self._lock_path(name)).unlink(missing_ok=True)  # nobody is left who would
            elif held is not None:
                with suppress(SQLAlchemyError):
                    held.execute(sa.select(sa.func.pg_advisory_unlock_all()))  # at once, not when the session has ended
            if held is not None:
                self._let_go(held)

    def close(self) -> None:
        """Let go of all connections; idempotent."""
        if self._lease is not None:
            self._let_go(self._lease)
        self._lease, self._leased = None, ""
        self._engine.dispose()

    def _let_go(self, lease: int | sa.Connection) -> None:
        if isinstance(lease, int):
            os.close(lease)
        else:
            lease.invalidate()  # the end of the session is the end of its lock
            lease.close()

    def _locked(self, name: str) -> int | sa.Connection | None:
        with self._explained():
            return self._locked_file(name) if self._is_sqlite else self._locked_session(name)

    def _lock_path(self, name: str) -> str:
        return f"{self._url.database}.{_digest(name).hex()[:8]}.lock"

    def _locked_file(self, name: str) -> int | None:
        path = self._lock_path(name)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}. Make its folder writable.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(handle), os.stat(path))  # and not removed between the two
        except OSError:
            is_there = False
        if not is_there:
            os.close(handle)
            return None
        return handle

    def _locked_session(self, name: str) -> sa.Connection | None:
        key = int.from_bytes(_digest(name)[:8], "big", signed=True)
        with ExitStack() as stack:
            connection = stack.enter_context(self._engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            if connection.scalar(sa.select(sa.func.pg_try_advisory_lock(key))):
                stack.pop_all()
                return connection
        return None

    def _prepare(self) -> None:
        """Make the tables where there are none; one process at a time."""
        with self._engine.begin() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            _SCHEMA.create(connection, checkfirst=True)
            found = connection.scalar(sa.select(sa.func.max(_SCHEMA.c.number)))
            if found not in (None, SCHEMA):
                raise ConfigError(
                    f"the database {self} has tables of layout {found}, and this penstock knows layout {SCHEMA}: "
                    "another version made them. Give another --database, or use that version."
                )
            _METADATA.create_all(connection)
            if found is None:
                connection.execute(_SCHEMA.insert().values(number=SCHEMA))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreError(
                f"the database {self} failed: {self._reason(error)}. Try again; if it stays so, look at the "
                "database's own log and at the space that is left."
            ) from None  # the cause may hold the password

    def _reason(self, error: SQLAlchemyError) -> str:
        """What the database said, in one line."""
        text = " ".join(str(getattr(error, "orig", None) or error).split()).rstrip(".")
        for secret in _secrets(self._url):
            text = text.replace(secret, "***")
        return text


def shown_url(url: str) -> str:
    """The URL of a database without anything secret: no user, no password, no parameters.

    Raises:
        ConfigError: for one that names no database.
    """
    return _shown(_parsed(url))


def _shown(url: sa.URL) -> str:
    place = f"{url.host or ''}{f':{url.port}' if url.port else ''}"
    return f"{url.get_backend_name()}://{place}/{url.database or ''}"


def _secrets(url: sa.URL) -> list[str]:
    """The passwords in a URL, wherever they stand."""
    given = [value for name, value in url.normalized_query.items() if "password" in name.lower()]
    return [secret for secret in (url.password, *(one for values in given for one in values)) if secret]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def _parsed(url: str) -> sa.URL:
    """The URL with the driver that is ours."""
    backend = ""
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (SQLAlchemyError, ValueError):
        parsed = sa.make_url("sqlite://")
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        scheme = url.partition(":")[0]  # not more of it: the rest may hold a password
        raise ConfigError(
            f"the database's URL ({scheme[:16]}:...) cannot be used. "
            "Give sqlite:///folder/file or postgresql://user:password@host/name."
        )
    if parsed.host or parsed.database in (None, "", ":memory:"):
        raise ConfigError("the database's URL names no file, and jobs must last. Give sqlite:///folder/file.")
    return parsed.set(drivername="sqlite")


def _engine(url: sa.URL) -> sa.Engine:
    """Connections for a URL; none is opened yet."""
    if url.get_backend_name() == "sqlite":
        try:
            Path(str(url.database)).absolute().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"the folder of the database {url.database} cannot be made: {error.strerror}. Give another --database."
            ) from error
        wait = {"timeout": _BUSY_S}
        engine = sa.create_engine(url, hide_parameters=True, pool_size=16, max_overflow=48, connect_args=wait)
        sa.event.listen(engine, "connect", _tune)
        return engine
    wait = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_S}
    try:
        return sa.create_engine(
            url, hide_parameters=True, pool_size=8, max_overflow=8, pool_pre_ping=True, connect_args=wait
        )
    except ImportError as error:
        raise ConfigError(
            f"PostgreSQL needs the driver psycopg, which is not here: {error}. Run pip install penstock[postgres]."
        ) from error


def _tune(connection: Any, _: object) -> None:
    """Readers beside the writer; a commit survives the end of the process, and a power cut loses the last ones only."""
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
    finally:
        cursor.close()

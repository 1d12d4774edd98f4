"""A real PostgreSQL for tests: its own server in a folder of its own, reached by a socket in it, gone afterwards.

Where Debian's package `postgresql` is not installed the tests are skipped; with PENSTOCK_REQUIRE_SERVICES=1 they fail.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from tests import processes

PASSWORD = "s3cret/of@tests"
_START_S = 60


def _programs() -> Path | None:
    """The folder of initdb and postgres, the newest first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]), reverse=True)
    on_path = shutil.which("initdb")
    return found[0].parent if found else Path(on_path).resolve().parent if on_path else None


def _connect(folder: Path, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(host=str(folder), user="tests", password=PASSWORD, dbname=database, autocommit=True)


@pytest.fixture(scope="session")
def postgres_folder() -> Iterator[Path]:
    """The folder with the socket of a running server."""
    programs = _programs()
    if programs is None:
        reason = "PostgreSQL's programs (initdb, postgres) are not installed: apt-get install postgresql"
        if os.environ.get("PENSTOCK_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    user = _as_postgres() if os.geteuid() == 0 else []  # not as root
    folder = Path(tempfile.mkdtemp(prefix="penstock-postgres-", dir="/tmp"))  # a socket's path is at most 107 bytes
    if user:
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
    secret = folder / "password"
    secret.write_text(PASSWORD, "utf-8")
    secret.chmod(0o644)
    data = folder / "data"
    arguments = ["-D", str(data), "-U", "tests", "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "-N"]
    processes.run([*user, programs / "initdb", *arguments], cwd=folder, check=True, capture_output=True)
    settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
    command = [*user, programs / "postgres", "-D", str(data), *settings]
    try:
        with (folder / "log").open("wb") as log:
            server = processes.Process[bytes](command, cwd=folder, stdout=log, stderr=log)
        with server:
            _wait(folder, server)
            yield folder
            server.terminate()
            with suppress(processes.TimeoutExpired):
                server.wait(10)
    finally:
        shutil.rmtree(folder)


def _as_postgres() -> list[str]:
    """What a command begins with to run as that user; it takes over that the command ends with the tests."""
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=INT"]


def _wait(folder: Path, server: processes.Process[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            _connect(folder).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text("utf-8")
            time.sleep(0.05)


@pytest.fixture
def postgres_url(postgres_folder: Path) -> Iterator[str]:
    """The URL of a fresh database."""
    name = f"tests_{secrets.token_hex(8)}"
    with _connect(postgres_folder) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield f"postgresql://tests:{quote(PASSWORD, safe='')}@/{name}?host={postgres_folder}"
    with _connect(postgres_folder) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    return str(request.getfixturevalue("postgres_url"))

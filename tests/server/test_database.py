"""Opening a database: what is refused, in which words, and what is left alone."""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from penstock.errors import ConfigError
from penstock.server.database import SCHEMA, Database, LeaseLostError, StoreError, _parsed, shown_url
from tests import processes

HOLD = """
import sys, time
from penstock.server.database import Database
database = Database(sys.argv[1])
database.lease("alpha")
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://user:hunter2@host/name", "postgresql://user:hunter2@host:hunter2/name"]
)
def test_a_url_that_names_no_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///folder/file or postgresql://") as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite://folder/file"])
def test_jobs_are_not_kept_in_memory(url: str) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        Database(url)


def test_a_folder_is_made_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path}/new/folder/jobs.sqlite").close()
    assert (tmp_path / "new" / "folder" / "jobs.sqlite").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="folder of the database .*cannot be made"):
        Database(f"sqlite:///{tmp_path}/file/jobs.sqlite")


def test_what_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text("Dear reader, " * 100, "utf-8")
    with pytest.raises(ConfigError, match="cannot be opened: file is not a database"):
        Database(f"sqlite:///{path}")
    assert path.read_text("utf-8").startswith("Dear reader")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path}")


def test_a_refused_connection_and_a_wrong_password_do_not_show_it(postgres_url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://127.0.0.1:1/name cannot be opened") as caught:
        Database("postgresql://user:hunter2@127.0.0.1:1/name")
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None
    start, _, rest = postgres_url.partition("@")
    with pytest.raises(ConfigError, match="password authentication failed") as caught:
        Database(f"{start.rpartition(':')[0]}:hunter2@{rest}")
    assert "hunter2" not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install penstock\[postgres\]"):
        Database("postgresql://user:hunter2@host/name")


def test_tables_of_another_layout_are_left_alone(database_url: str) -> None:
    database = Database(database_url)
    with database.writing() as connection:
        connection.execute(sa.text(f"UPDATE penstock_schema SET number = {SCHEMA + 1}"))
    database.close()
    with pytest.raises(ConfigError, match=f"layout {SCHEMA + 1}, and this penstock knows layout {SCHEMA}"):
        Database(database_url)


def test_many_open_a_new_database_at_once(database_url: str) -> None:
    opened: list[Database] = []
    failures: list[ConfigError] = []

    def open_one() -> None:
        try:
            opened.append(Database(database_url))
        except ConfigError as error:
            failures.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in opened:
        database.close()
    assert not failures and len(opened) == 8


def test_a_block_that_fails_changes_nothing(database_url: str) -> None:
    database = Database(database_url)
    with pytest.raises(StoreError, match="failed: .*penstock_nothing"), database.writing() as connection:
        connection.execute(sa.text("DELETE FROM penstock_schema"))
        connection.execute(sa.text("DELETE FROM penstock_nothing"))
    with database.reading() as connection:
        assert connection.scalar(sa.text("SELECT number FROM penstock_schema")) == SCHEMA
    database.close()


def test_sqlite_reads_beside_its_writer(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/jobs.sqlite")
    with database.writing() as writer:
        writer.execute(sa.text("DELETE FROM penstock_schema"))
        with database.reading() as reader:
            assert reader.scalar(sa.text("SELECT number FROM penstock_schema")) == SCHEMA
    database.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_name_is_held_by_one_until_its_process_ends(database_url: str) -> None:
    database = Database(database_url)
    command = [sys.executable, "-c", HOLD, database_url]
    with processes.Process[str](command, stdout=processes.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="a server named 'alpha' is running"):
            database.lease("alpha")
        database.lease("beta")
        database.close()
        holder.kill()
        holder.wait()
    for name in ("alpha", "beta"):
        other = Database(database_url)
        other.lease(name)
        other.lease(name)
        assert other.is_leased
        other.close()
        assert not other.is_leased


def test_whether_another_holds_a_name(database_url: str) -> None:
    one, other = Database(database_url), Database(database_url)
    one.lease("alpha")
    with other.holding("alpha") as is_free:
        assert not is_free
    with other.holding("beta") as is_free:
        assert is_free
        with one.holding("beta") as is_free_too:
            assert not is_free_too
    with one.holding("beta") as is_free:
        assert is_free
    one.close()
    other.lease("alpha")  # within a second: so long PostgreSQL may take to see that a session has ended
    other.close()


def test_locks_of_dead_names_do_not_pile_up(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/jobs.sqlite")
    for number in range(5):
        with database.holding(f"penstock-{number}"):
            assert len(list(tmp_path.glob("*.lock"))) == 1
    database.close()
    assert not list(tmp_path.glob("*.lock"))


def test_a_lease_that_postgresql_has_lost_is_taken_again_or_told_of(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, other = Database(postgres_url), Database(postgres_url)
    assert not database.renew()  # it holds none
    database.lease("alpha")
    assert not database.renew()
    end_sessions(other)
    assert database.renew() and not database.renew() and database.is_leased
    end_sessions(other)
    other.lease("alpha")
    with pytest.raises(StoreError, match="has not let go of it yet"):
        database.renew()  # it may be its own session that still has it
    monkeypatch.setattr("penstock.server.database._LOST_S", 0.0)
    with pytest.raises(LeaseLostError, match="'alpha', and another server has taken it"):
        database.renew()
    database.close()
    other.close()


def end_sessions(database: Database) -> None:
    """As a restart of PostgreSQL does with all sessions but this one."""
    with database.reading() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_no_password_is_shown_wherever_it_stands() -> None:
    for url in (
        "postgresql://ann:hunter2@host:5432/jobs",
        "postgresql://host:5432/jobs?user=ann&password=hunter2",
        "postgresql://host:5432/jobs?sslpassword=hunter2",
    ):
        assert shown_url(url) == "postgresql+psycopg://host:5432/jobs".replace("+psycopg", "")
        database = Database.__new__(Database)
        database._url = _parsed(url)
        assert database._reason(SQLAlchemyError("no entry for hunter2")) == "no entry for ***"

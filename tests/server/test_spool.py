"""Folders for files on their way: one for each process, and none of a dead one."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.server.spool import Spool
from tests import processes

HOLD = """
import sys, time
from penstock.server.spool import Spool
spool = Spool(sys.argv[1])
(spool.path / "job").mkdir()
(spool.path / "job" / "half").write_bytes(b"half")
print(spool.path, flush=True)
time.sleep(600)
"""


def test_each_has_its_own_and_removes_it(tmp_path: Path) -> None:
    first, second = Spool(tmp_path / "new" / "root"), Spool(tmp_path / "new" / "root")
    assert first.path != second.path and first.num_removed == second.num_removed == 0
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
    (first.path / "file").touch()
    for _ in range(2):
        first.close()
    assert not first.path.exists() and second.path.is_dir()
    second.close()


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with processes.Process[str](command, stdout=processes.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        (tmp_path / "of somebody else").mkdir()
        (tmp_path / "penstock-spool-link").symlink_to(tmp_path / "of somebody else")
        alive = Spool(tmp_path)
        assert alive.num_removed == 0 and (left / "job" / "half").is_file()
        holder.kill()
        holder.wait()
    again = Spool(tmp_path)
    assert again.num_removed == 1 and not left.exists()
    assert alive.path.is_dir() and (tmp_path / "of somebody else").is_dir()
    alive.close()
    again.close()


def test_a_place_that_cannot_hold_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot hold files on their way: Not a directory.*XDG_CACHE_HOME"):
        Spool(tmp_path / "file" / "below")


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Spool(tmp_path).close()
    assert len(os.listdir("/proc/self/fd")) == before

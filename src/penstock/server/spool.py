"""The folder of a running server for files on their way: uploads, and what ranks have written but nobody keeps yet.

Owns that each process has its own, and that those of dead ones are removed. Does not know what is in them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from penstock.errors import ConfigError

_PREFIX = "penstock-spool-"
_LOCK = ".lock"


class Spool:
    """A folder of this process alone; those that dead processes have left beside it are removed.

    Args:
        root: in which it is made; made where it is missing.

    Raises:
        ConfigError: where it cannot be made.

    Attributes:
        path: where it is.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            Path(root).mkdir(parents=True, exist_ok=True, mode=0o700)
            guard = os.open(root, os.O_RDONLY)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)  # between making a folder and locking it, another would remove it
                self.num_removed = _remove_dead(Path(root))
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
                self._lock: int | None = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(guard)
        except OSError as error:
            raise ConfigError(
                f"{root} cannot hold files on their way: {error.strerror}. Make it writable, or set "
                "XDG_CACHE_HOME to another folder."
            ) from error

    def close(self) -> None:
        """Remove it, with all that is in it; idempotent."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _remove_dead(root: Path) -> int:
    """Remove the folders whose processes hold no lock; how many they were."""
    count = 0
    for folder in root.glob(f"{_PREFIX}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            continue  # another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
            count += not folder.exists()
        finally:
            os.close(lock)
    return count

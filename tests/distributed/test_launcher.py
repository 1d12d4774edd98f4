"""What a rank does for its launcher; nothing in a process that has none."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

from penstock.distributed.launcher import (
    ERRORS,
    GROUPS,
    LAUNCHER,
    LISTENER,
    inherited_listener,
    is_launched,
    num_groups,
    obey,
    tell,
)
from tests.processes import forked


def test_process_of_its_own_owes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    obey()
    tell("to nobody")
    assert not is_launched() and inherited_listener() is None


def test_rank_0_tells_what_the_user_was_told_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as errors:
        monkeypatch.setenv(LAUNCHER, str(os.getppid()))
        monkeypatch.setenv(ERRORS, str(errors.fileno()))
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            tell(f"from {rank}")
        errors.seek(0)
        assert is_launched() and errors.read() == b"from 0"


def test_listener_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LISTENER, "7")
    assert inherited_listener() == 7
    assert inherited_listener() is None


def test_rank_of_a_living_launcher_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child: it is killed with its parent, and this one is not to be."""

    def act() -> None:
        os.environ[LAUNCHER] = str(os.getppid())
        obey()
        os.kill(os.getpid(), signal.SIGTERM)

    assert forked(act) == -signal.SIGTERM


def test_groups_that_share_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GROUPS, raising=False)
    assert num_groups() == 1
    monkeypatch.setenv(GROUPS, "3")
    assert num_groups() == 3

"""Who may write what ranks read: the ranks of this run, and nobody else who reaches their store."""

from __future__ import annotations

import hmac
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from penstock.distributed import signing
from penstock.distributed.board import Board, Call, Place
from penstock.distributed.launcher import LAUNCHER, SECRET
from penstock.distributed.signing import Signer, agree_on_secret, run_secret
from penstock.errors import GenerationError
from tests.ranks import run_ranks

CALL = Call((0, 1), 1)


@dataclass(frozen=True)
class Meeting:
    """A store, a rank of the run that uses it, and a stranger who knows all but the secret."""

    board: Board
    store: Any

    def overwrite(self, key: str, data: bytes) -> None:
        self.store.set(f"penstock/watch/{key}", data)
        self.store.get(f"penstock/watch/{key}")  # it has been read

    def value(self, key: str) -> bytes:
        return bytes(self.store.get(f"penstock/watch/{key}"))


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setenv(SECRET, "of this run")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    yield Meeting(Board(store), store.clone())


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_a_rank_writes_another_reads_as_the_same_type() -> None:
    signer = Signer(b"secret")
    for value, kind in (({1: [2, None]}, dict[int, list[int | None]]), (("a", 2), tuple[str, int]), (CALL, Call)):
        assert Signer(b"secret").read("name", signer.write("name", value), kind) == value  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="'name' .* not what this version of penstock writes: Expected `int`"):
        signer.read("name", signer.write("name", "text"), int)
    with pytest.raises(TypeError):
        signer.write("name", Payload(Path()))


def test_a_value_of_a_stranger_is_refused_by_name_and_never_executed(meeting: Meeting, tmp_path: Path) -> None:
    meeting.board.place(1, Place(Counter({(0, 1): 3})))
    assert meeting.board.place_of(1).numbers.total() == 3
    forged = Signer(b"a guess").write("place/1", ([], None))
    for data in (pickle.dumps(Payload(tmp_path / "executed")), forged, b""):
        meeting.overwrite("place/1", data)
        with pytest.raises(
            GenerationError, match=r"'place/1' .* not signed with the secret of this run: somebody else"
        ):
            meeting.board.place_of(1)
    meeting.overwrite("value/0.1/1/0/0", forged)
    meeting.overwrite("value/0.1/1/0/1", forged)
    with pytest.raises(GenerationError, match=r"'value/0.1/1/0/0' .* not signed"):
        meeting.board.brought(CALL, 0, dict)
    assert not (tmp_path / "executed").exists()


def test_a_signed_value_counts_under_its_own_name_alone(meeting: Meeting) -> None:
    meeting.board.end(0)
    meeting.overwrite("ended/1", meeting.value("ended/0"))
    meeting.board.move_in(1)
    with pytest.raises(GenerationError, match="'ended/1'"):
        meeting.board.has_ended(1)


def test_without_the_signature_the_strangers_value_is_taken(
    meeting: Meeting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control; even then nothing that is read is executed."""
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: True)
    meeting.overwrite("stuck/1", Signer(b"a guess").write("stuck/1", CALL))
    assert meeting.board.is_stuck(1, CALL)
    digest = Signer(b"").write("x", None)[:32]
    meeting.overwrite("stuck/1", digest + pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(GenerationError, match="'stuck/1' .* not what this version"):
        meeting.board.is_stuck(1, CALL)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # as it would have been


def secrets_of(given: str) -> tuple[bytes, bytes]:
    """What a rank has before and after it agreed with the others; of rank 1 the user has given another secret."""
    rank, own = dist.get_rank(), os.environ.pop(SECRET, None)
    if given:
        os.environ[SECRET] = given if rank == 0 else f"not {given}"
    kept, signing._agreed = signing._agreed, None
    try:
        before = run_secret()
        agree_on_secret()
        agree_on_secret()  # nothing the second time
        return before, run_secret()
    finally:
        signing._agreed = kept
        os.environ.pop(SECRET, None)
        if own is not None:
            os.environ[SECRET] = own


def test_ranks_of_other_launchers_agree_on_a_secret() -> None:
    (none, one), (_, other) = run_ranks(2, secrets_of, "")
    assert none == b"" and one == other and len(one) == 32
    assert run_ranks(2, secrets_of, "")[0][1] != one  # drawn afresh
    (given, one), (_, other) = run_ranks(2, secrets_of, "given")
    assert given == b"given" and one != other  # and so each refuses what the other writes


def test_ranks_of_our_launcher_have_their_secret_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setenv(SECRET, "from it")
    monkeypatch.setattr(signing, "_agreed", None)  # of a group that another test has made
    agree_on_secret()
    assert run_secret() == b"from it" and signing._agreed is None

"""Two and three real processes: one raises, hangs, is killed or is only late, and nobody waits for ever."""

from __future__ import annotations

import atexit
import signal
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch.distributed as dist

from penstock.distributed.watch import Watch
from penstock.errors import GenerationError
from tests.distributed.processes import QUICK, run


@pytest.mark.thorough
def test_rank_that_waits_for_one_that_caught_its_error_ends(tmp_path: Path) -> None:
    """With the seconds of every day: the failing rank lives on, so that nothing but the watch can end the other."""
    first, second = run(
        """
watch = current_watch()
assert watch is current_watch()
try:
    with watch:
        exchange()
        if rank == 1:
            raise ValueError("only here")
        exchange()
except ValueError:
    time.sleep(12)
    say("lives")
""",
        tmp_path,
    )
    assert first.code == 1 and first.elapsed_s < 10
    assert "rank 0 ends: rank 1 failed" in first.err
    assert "ValueError: only here" in first.err and "raise ValueError" in first.err
    assert second.code == 0 and second.out == "lives\n"


def test_ranks_that_all_raise_live_on_and_the_next_call_works(tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + """
for call in range(3):
    try:
        with watch:
            exchange()
            if call != 1:
                time.sleep(0.3 * rank)
                raise RuntimeError("everywhere")
    except RuntimeError as error:
        say(error)
        time.sleep(1.5 * (1 - rank))  # one is late for the next call, by more than the grace
with watch, watch:
    say(exchange())
""",
        tmp_path,
    )
    for rank in ranks:
        assert (rank.code, rank.out, rank.err) == (0, "everywhere\neverywhere\n2\n", "")


@pytest.mark.parametrize("guilty", [0, 1])
def test_error_of_an_exchange_names_the_rank_that_failed(guilty: int, tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + f"""
try:
    with watch:
        exchange()
        if rank == {guilty}:
            raise ValueError("only here.")
        exchange()
except GenerationError as error:
    say(error)
""",
        tmp_path,
        num_ranks=3,
    )
    assert ranks[guilty].code == 1 and "ValueError: only here." in ranks[guilty].err
    for rank in ranks[:guilty] + ranks[guilty + 1 :]:
        ended_by_watch = rank.code == 1 and "only here" in rank.err
        assert ended_by_watch or rank.out == f"rank {guilty} failed: ValueError: only here. Start all ranks again.\n"
        assert rank.elapsed_s < 10


def test_rank_that_failed_and_never_comes_back_does_not_stop_the_next_call(tmp_path: Path) -> None:
    first, second = run(
        QUICK
        + """
with watch:
    exchange()
    if rank == 1:
        try:
            with watch:
                pass
        finally:
            pass
try:
    with watch:
        exchange()
        if rank == 1:
            raise ValueError("after the last exchange")
except ValueError:
    time.sleep(4)
    sys.exit(0)
with watch:
    exchange()
""",
        tmp_path,
    )
    assert second.code == 0
    assert first.code == 1 and "after the last exchange" in first.err


def test_rank_that_failed_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + """
try:
    with watch:
        exchange()
        if rank == 1:
            raise ValueError("after the last exchange")
except ValueError:
    pass
with watch:
    time.sleep(1.5 * rank)
    say(exchange())
""",
        tmp_path,
    )
    assert [(rank.code, rank.out) for rank in ranks] == [(0, "2\n"), (0, "2\n")]


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_is_named(killed: int, tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + f"""
try:
    with watch:
        exchange()
        if rank == {killed}:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange()
except GenerationError as error:
    say(error)
""",
        tmp_path,
    )
    assert ranks[killed].code == -signal.SIGKILL
    assert ranks[1 - killed].out.startswith(f"rank {killed} is gone")


@pytest.mark.parametrize("killed", [0, 1])
def test_rank_that_waits_without_noticing_ends_when_another_is_killed(killed: int, tmp_path: Path) -> None:
    """As with libraries whose exchanges do not notice that a peer has gone."""
    ranks = run(
        QUICK
        + f"""
with watch:
    exchange()
    if rank == {killed}:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
""",
        tmp_path,
    )
    waiting = ranks[1 - killed]
    assert waiting.code == 1 and f"rank {1 - killed} ends: rank {killed} is gone" in waiting.err
    assert waiting.elapsed_s < 10


def test_rank_0_leaves_last_and_slow_ranks_finish(tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + """
with watch:
    exchange()
    time.sleep(1.5 * rank)
dist.destroy_process_group()
say("done")
""",
        tmp_path,
        num_ranks=3,
    )
    assert [(rank.code, rank.out, rank.err) for rank in ranks] == [(0, "done\n", "")] * 3


def test_calls_are_counted_for_each_group(tmp_path: Path) -> None:
    """Rank 2 has made more calls than rank 1 when they meet, and is to blame all the same when it fails then."""
    ranks = run(
        QUICK
        + """
pairs = dist.new_group([0, 2])
for call in range(3):
    if rank != 1:
        watch.attend((0, 2))
        with watch:
            dist.barrier(pairs)
watch.attend(range(world_size))
try:
    with watch:
        exchange()
        if rank == 2:
            raise ValueError("only here")
        exchange()
except ValueError:
    time.sleep(6)
    say("lives")
""",
        tmp_path,
        num_ranks=3,
    )
    assert ranks[2].out == "lives\n"
    for rank in ranks[:2]:
        assert rank.code == 1 and "rank 2 failed, and this one waited" in rank.err and rank.elapsed_s < 6


def test_rank_that_failed_once_and_has_made_calls_since_may_be_late(tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + """
try:
    with watch:
        exchange()
        if rank == 1:
            raise ValueError("after the last exchange")
except ValueError:
    pass
with watch:
    exchange()
time.sleep(1.5 * rank)
with watch:
    say(exchange())
""",
        tmp_path,
    )
    assert [(rank.code, rank.out) for rank in ranks] == [(0, "2\n"), (0, "2\n")]


def test_watch_of_other_ranks_inside_a_call_is_that_of_the_call(tmp_path: Path) -> None:
    ranks = run(
        """
assert current_watch((rank,)) is None
with current_watch():
    with current_watch((0, 1)):
        exchange()
    if rank == 2:
        sys.exit("only here")
    exchange()
""",
        tmp_path,
        num_ranks=3,
    )
    assert ranks[2].code == 1 and "only here" in ranks[2].err
    for rank in ranks[:2]:
        assert rank.code == 1 and "SystemExit: only here" in rank.err and rank.elapsed_s < 10


class Board:
    """A board that loses its store, and gets it back."""

    is_lost = True

    def place(self, rank: int, place: object) -> None:
        if self.is_lost:
            raise RuntimeError("broken pipe")


def test_entering_that_fails_is_no_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    watch = Watch(store, 0, 2)
    board = Board()
    real = watch._board
    monkeypatch.setattr(watch, "_board", board)
    try:
        with pytest.raises(GenerationError, match="rank 0 is gone"):
            watch.__enter__()
        assert not watch._inside.is_set()
        board.is_lost = False
        with watch:
            assert watch._inside.is_set()
    finally:
        monkeypatch.setattr(watch, "_board", real)
        atexit.unregister(watch._end)
        watch._end()


def test_a_value_of_a_stranger_ends_who_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    blamed: SimpleQueue[str] = SimpleQueue()

    def end(self: Watch, board: object, call: object, blame: Any) -> None:
        blamed.put(blame.text)
        self._ended.set()  # in place of the process

    monkeypatch.setattr(Watch, "_exit", end)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    watch = Watch(store, 0, 2, poll_s=0.01, grace_s=0.05)
    with watch:
        stranger = dist.PrefixStore("penstock/watch", store.clone())
        stranger.set("failure/1", "rank 1 failed")
        stranger.add("tickets", 1)
        assert "'failure/1' in the store of the ranks (13 bytes) is not signed" in blamed.get(timeout=60)
    atexit.unregister(watch._end)
    watch._end()


def test_end_is_quick(tmp_path: Path) -> None:
    """Rank 0 leaves as soon as the others have left, and nobody waits for the thread that looks."""
    script = """
with current_watch():
    exchange()
dist.destroy_process_group()
import atexit
begun_s = time.monotonic()
atexit._run_exitfuncs()
say(time.monotonic() - begun_s)
os._exit(0)
"""
    for rank in run(script, tmp_path, num_ranks=3):
        assert float(rank.out) < 1, rank.err


def test_without_the_watch_the_rank_would_wait(tmp_path: Path) -> None:
    """The control: what the first test shows is the watch's doing."""
    script = """
try:
    exchange()
    if rank == 1:
        raise ValueError("only here")
    exchange()
except ValueError:
    time.sleep(4)
    say("lives")
"""
    first, second = run(script, tmp_path)
    assert second.out == "lives\n"
    assert first.elapsed_s >= 4

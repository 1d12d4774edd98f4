"""Ranks that wait for one that has left, is late or computes: who is blamed, and who is not; values that come late."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.processes import QUICK, run
from tests.turns import by_turns

LEFT = "left the call, which this rank is still in and waits for it, as after an early stop on one rank only"


@pytest.mark.parametrize("num_ranks", by_turns([3, 2], 2))
def test_rank_that_left_a_call_which_others_are_still_in_is_named(num_ranks: int, tmp_path: Path) -> None:
    ranks = run(
        QUICK
        + """
with watch:
    meet()
    if rank != world_size - 1:
        meet()
time.sleep(12)
say("lives")
""",
        tmp_path,
        num_ranks,
    )
    *stuck, last = ranks
    assert (last.code, last.out) == (0, "lives\n")
    for rank in stuck:
        assert rank.code == 1 and f"rank {num_ranks - 1} {LEFT}" in rank.err and rank.elapsed_s < 10


@pytest.mark.thorough
def test_rank_that_went_on_to_its_next_call_is_named(tmp_path: Path) -> None:
    """With the seconds of every day, and gloo: what both exchange does not fit, or both wait."""
    first, second = run(
        """
watch = current_watch()
with watch:
    meet()
    if rank == 0:
        group = Group("some", rank, (0, 1), dist.group.WORLD)
        group.receive(torch.ones(1), 1).wait()
with watch:
    meet()
""",
        tmp_path,
    )
    assert first.code == 1 and "rank 1 left the call" in first.err and first.elapsed_s < 40
    assert second.code == 1
    assert "rank 0 is still in an earlier call" in second.err or "rank 1 left the call" in second.err


@pytest.mark.thorough
def test_error_of_an_exchange_names_the_rank_that_is_in_another_call(tmp_path: Path) -> None:
    first, _ = run(
        """
watch = Watch(store, rank, world_size)
pair = dist.new_group([0, 1], timeout=timedelta(seconds=2))
for call in range(2):
    try:
        with watch:
            if call == 0:
                meet()
            if rank == 0:
                meet((0, 1), pair)
    except GenerationError as error:
        say(error)
    if rank == 1:
        break
time.sleep(8 * rank)
""",
        tmp_path,
    )
    left, late = first.out.splitlines()
    assert left == f"rank 1 {LEFT}. Start all ranks again."
    assert late.startswith("rank 1 has not begun this call, in which this rank waited for it")


@pytest.mark.thorough
def test_nobody_is_blamed_for_leaving_while_somebody_computes(tmp_path: Path) -> None:
    """Rank 1 has left; rank 0 computes for longer than the patience, and rank 2 waits for rank 0 as long."""
    ranks = run(
        QUICK
        + """
trio = dist.new_group([0, 1, 2])
with watch:
    meet()
    if rank == 0:
        time.sleep(4)
    if rank != 1:
        meet((0, 1, 2), trio)
if rank == 1:
    meet((0, 1, 2), trio)  # as what it sent before it left, and they receive late
with watch:
    say(meet())
dist.destroy_process_group()
""",
        tmp_path,
        num_ranks=3,
    )
    assert [(rank.code, rank.out, rank.err) for rank in ranks] == [(0, "3\n", "")] * 3


@pytest.mark.thorough
def test_a_rank_may_be_late_for_a_call_and_leave_it_early(tmp_path: Path) -> None:
    """Rank 1 is late by more than all patience, and then computes alone when the others have gone on."""
    ranks = run(
        QUICK
        + """
time.sleep(4 * (rank == 1))
with watch:
    meet()
    time.sleep(4 * (rank == 1))
with watch:
    say(meet())
""",
        tmp_path,
        num_ranks=3,
    )
    assert [(rank.code, rank.out, rank.err) for rank in ranks] == [(0, "3\n", "")] * 3


@pytest.mark.thorough  # torch aborts now and then as such a process ends, on a busy machine
def test_what_a_rank_sent_before_it_left_may_be_long_on_its_way(tmp_path: Path) -> None:
    ranks = run(
        """
watch = Watch(store, rank, world_size, poll_s=0.1, grace_s=0.1, patience_s=6)
with watch:
    meet()
    if rank == 0:
        meet()
if rank == 1:
    time.sleep(2)
    meet()
say("done")
""",
        tmp_path,
    )
    assert [(rank.code, rank.out, rank.err) for rank in ranks] == [(0, "done\n", "")] * 2


@pytest.mark.thorough
def test_values_are_gathered_however_late_the_slowest_is(tmp_path: Path) -> None:
    """Later than the process group's own timeout, which ends the control."""
    script = """
watch = current_watch()
pair = dist.new_group([0, 1], timeout=timedelta(seconds=1))
with watch:
    meet()
    time.sleep(4 * rank)
    say(watch.gather({rank: "x"}, dict[int, str]), watch.gather(rank, int))
    meet()
    try:
        time.sleep(2.5 * rank)
        meet((0, 1), pair)
    except RuntimeError:
        say("the control timed out")
"""
    for rank in run(script, tmp_path):
        assert rank.code == 0 and rank.out == "[{0: 'x'}, {1: 'x'}] [0, 1]\nthe control timed out\n", rank.err


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("raise ValueError('only here')", "rank 1 failed, and this one waited for it: ValueError: only here."),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 is gone: its process was ended."),
    ],
)
def test_who_gathers_hears_of_a_rank_that_fails_instead(end: str, told: str, tmp_path: Path) -> None:
    script = """
watch = current_watch()
try:
    with watch:
        meet()
        if rank == 1:
            END
        watch.gather(rank, int)
except GenerationError as error:
    say(error)
except ValueError:
    time.sleep(12)
"""
    first, _ = run(script.replace("END", end), tmp_path)
    assert first.code == 0 and first.out == f"{told} Start all ranks again.\n" and first.elapsed_s < 10

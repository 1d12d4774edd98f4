"""Host transfers: every byte, in order, beside compute; errors, cancelled fills and the end of threads."""

from __future__ import annotations

import threading
import time

import pytest

from penstock.errors import WeightsError
from penstock.offload.transfer import HostTransfer
from penstock.timeline import Timeline
from penstock.weights.memory import Arena
from penstock.weights.sources import Part
from tests.offload.toys import CPU, Scripted
from tests.waiting import has_ended, threads_of

NUM = 8


@pytest.fixture
def arena() -> Arena:
    return Arena(4096, CPU)


def value(number: int) -> Part:
    """Writes its number to its own eight bytes."""
    return Part(NUM * number, NUM, lambda memory: memory.__setitem__(slice(None), bytes([number]) * NUM))


def test_parts_reach_their_places_and_are_counted(arena: Arena) -> None:
    timeline = Timeline()
    transfer = HostTransfer(arena, timeline)
    ticket = transfer.submit("unit", Scripted([value(number) for number in range(5)]), 100)
    transfer.wait(ticket)
    transfer.wait(ticket)  # a second time costs nothing
    assert arena.tensor[100 : 100 + 5 * NUM].tolist() == [number for number in range(5) for _ in range(NUM)]
    assert arena.tensor[:100].sum() == arena.tensor[140:].sum() == 0
    assert transfer.moved_bytes == 40 and transfer.busy_s > 0
    spans = timeline.spans
    assert [(span.kind, span.unit, span.num_bytes) for span in spans] == [("fill", "unit", NUM)] * 5
    assert {span.lane for span in spans} <= threads_of("penstock-reader")
    transfer.close()
    assert has_ended("penstock-reader")


def test_margins_are_lent_to_the_part(arena: Arena) -> None:
    lengths: list[int] = []
    transfer = HostTransfer(arena)
    transfer.wait(transfer.submit("unit", Scripted([Part(10, 20, lambda m: lengths.append(len(m)), (10, 2))]), 64))
    transfer.close()
    assert lengths == [32]


def test_fills_come_in_the_order_in_which_they_were_asked_for(arena: Arena) -> None:
    order: list[int] = []
    transfer = HostTransfer(arena, num_threads=1)
    tickets = [transfer.submit("unit", Scripted([Part(0, 1, lambda _, n=n: order.append(n))]), n) for n in range(20)]
    transfer.wait(tickets[-1])
    transfer.close()
    assert order == list(range(20))


def test_a_slow_source_is_waited_for_and_others_go_on_beside_it(arena: Arena) -> None:
    gate = threading.Event()
    transfer = HostTransfer(arena)
    slow = transfer.submit("slow", Scripted([Part(0, 1, lambda memory: gate.wait(10) and None)]), 0)
    fast = transfer.submit("fast", Scripted([value(3)]), 64)
    transfer.wait(fast)
    assert not slow.work[0].done()
    threading.Timer(0.05, gate.set).start()
    begun_s = time.perf_counter()
    transfer.wait(slow)
    transfer.close()
    assert time.perf_counter() - begun_s > 0.02 and transfer.busy_s > 0.04


def test_errors_of_readers_reach_the_caller_and_spare_other_fills(arena: Arena) -> None:
    def fail(_: memoryview) -> None:
        raise WeightsError("the disk is gone")

    transfer = HostTransfer(arena)
    broken = transfer.submit("broken", Scripted([value(0), Part(8, 8, fail)]), 0)
    sound = transfer.submit("sound", Scripted([value(1)]), 64)
    with pytest.raises(WeightsError, match="the disk is gone"):
        transfer.wait(broken)
    transfer.cancel(broken)
    transfer.wait(sound)
    transfer.close()


def test_nothing_writes_after_a_fill_was_cancelled(arena: Arena) -> None:
    gate = threading.Event()
    written: list[int] = []

    def write(number: int) -> None:
        gate.wait(10)
        written.append(number)

    transfer = HostTransfer(arena)
    ticket = transfer.submit("unit", Scripted([Part(n, 1, lambda _, n=n: write(n)) for n in range(9)]), 0)
    threading.Timer(0.05, gate.set).start()
    transfer.cancel(ticket)
    done = list(written)
    assert 1 <= len(done) <= 4  # what readers had begun was finished
    after = transfer.submit("unit", Scripted([value(2)]), 0)
    transfer.wait(after)
    transfer.close()
    assert written == done


def test_closing_drops_what_is_queued_and_ends_the_threads(arena: Arena) -> None:
    written: list[int] = []
    transfer = HostTransfer(arena, num_threads=1)

    def write(memory: memoryview) -> None:
        time.sleep(0.01)
        written.append(1)

    parts = [Part(0, 1, write)] * 100
    transfer.submit("unit", Scripted(parts), 0)
    transfer.close()
    assert len(written) < 100 and has_ended("penstock-reader")
    with pytest.raises(RuntimeError):
        transfer.submit("unit", Scripted([value(0)]), 0)

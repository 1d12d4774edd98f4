"""CUDA transfers without CUDA: every wait that correctness needs, and bytes through the ring of chunks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.errors import WeightsError
from penstock.offload import chunks, streamer
from penstock.offload.timing import Stays
from penstock.offload.transfer import HostTransfer
from penstock.timeline import Timeline
from penstock.weights import sources
from penstock.weights.host import HostStore
from penstock.weights.index import read_header
from penstock.weights.layout import packed
from penstock.weights.memory import Arena
from penstock.weights.ranges import Cast, FileRange, Piece
from penstock.weights.reader import FileReader
from penstock.weights.sources import FileSource, Part
from tests.offload.races import Cuda
from tests.offload.rigs import GPU, PAGE, rig_of, streaming
from tests.offload.toys import CPU, Pipeline, Scripted
from tests.waiting import has_ended

WAYS = ["store", "ring", "shards on it", "shards in store", "shards in files"]
NEEDED = {
    "free": ({"store": "copies", "ring": "copies", "shards on it": "exchanges"}, "copies", "W after R"),
    "ready": ({}, "compute", "R after W"),
    "part": ({}, "exchanges", "W after W"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_fill_and_no_read_race(prefetch: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pipeline()(num_steps=3)
    with streaming(Cuda(), prefetch, way, monkeypatch) as (pipeline, made, rig):
        for _ in range(2):
            assert torch.equal(pipeline(num_steps=3), expected)
        made.check_fills()
        assert made.residency.num_fills >= 6 * 6
        assert rig.races == []


@pytest.mark.parametrize(
    ("which", "way"),
    [("free", way) for way in WAYS] + [("ready", way) for way in WAYS] + [("part", way) for way in WAYS[3:]],
)
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_without_one_of_the_waits_races_are_found(
    prefetch: int, way: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, common, kind = NEEDED[which]
    with streaming(Cuda(f"{own.get(way, common)} waits"), prefetch, way, monkeypatch) as (pipeline, _, rig):
        pipeline(num_steps=3)
        assert kind in {race[0] for race in rig.races}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page per part and two per chunk, so that little goes round the ring."""
    monkeypatch.setattr(sources, "PART_BYTES", PAGE)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 2 * PAGE)


def stored(folder: Path, num_bytes: int = 20 * PAGE + 24) -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """A file with weights of several sizes; one is cast on the way."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "large": torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator),
        "small": torch.randn(33, generator=generator),
        "cast": torch.randn(3001, generator=generator).to(torch.bfloat16),
    }
    save_file(weights, folder / "weights.safetensors")
    records = {record.name: record for record in read_header(folder / "weights.safetensors")}
    pieces = []
    for name in weights:
        place = FileRange(records[name].file, records[name].offset, records[name].num_bytes)
        pieces.append(Piece(place, Cast(torch.bfloat16, torch.float32) if name == "cast" else None, 1))
    return pieces, {**weights, "cast": weights["cast"].float()}


@pytest.mark.usefixtures("small_chunks")
def test_files_reach_the_device_through_the_ring(tmp_path: Path) -> None:
    pieces, weights = stored(tmp_path)
    layout = packed(pieces)
    timeline = Timeline()
    rig = rig_of(Cuda(), Arena(layout.num_bytes + PAGE, CPU), timeline)
    source = FileSource(pieces, layout, FileReader())
    for round_number in range(3):
        rig.arena.tensor.zero_()
        ticket = rig.transfer.submit("unit", source, PAGE)
        rig.transfer.wait(ticket)
        for weight, position in zip(weights.values(), layout.positions, strict=True):
            expected = weight.view(torch.uint8)
            first = PAGE + position
            assert torch.equal(rig.arena.tensor[first : first + expected.numel()], expected), round_number
    assert len(rig.chunks) == chunks._NUM_CHUNKS and rig.races == []
    fills = [span for span in timeline.spans if span.kind == "fill"]
    assert sum(span.num_bytes for span in fills) == rig.transfer.moved_bytes
    assert rig.transfer.moved_bytes >= 3 * sum(weight.nbytes for weight in weights.values())
    assert all(0 < span.num_bytes <= 2 * PAGE and span.lane.startswith("penstock-reader") for span in fills)
    assert rig.transfer.busy_s > 0
    rig.transfer.close()
    assert all(chunk.is_closed for chunk in rig.chunks)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dropped", "is_safe"), [((), True), (("host waits",), False)], ids=["kept", "dropped"])
def test_a_chunk_is_written_only_after_it_was_copied(dropped: tuple[str, ...], is_safe: bool) -> None:
    rig = rig_of(Cuda(*dropped), Arena(64 * PAGE, CPU))

    def write(memory: memoryview) -> None:
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        for chunk in rig.chunks:
            begin = address - chunk.tensor.data_ptr()
            if 0 <= begin < chunk.tensor.numel():
                chunk.memory.access("W", "read", (begin, begin + len(memory)), rig.api.host_access())

    parts = [Part(number * PAGE, PAGE, write) for number in range(60)]
    rig.transfer.wait(rig.transfer.submit("unit", Scripted(parts), 0))
    rig.transfer.close()
    assert (not rig.races) is is_safe


@pytest.mark.usefixtures("small_chunks")
def test_errors_of_the_reader_reach_the_caller_and_cost_no_chunk() -> None:
    def fail(_: memoryview) -> None:
        raise WeightsError("the disk is gone")

    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    for _ in range(3 * chunks._NUM_CHUNKS):  # a ring that lost its chunks would wait for ever
        ticket = rig.transfer.submit("unit", Scripted([Part(0, 8, lambda _: None), Part(PAGE, 8, fail)]), 0)
        with pytest.raises(WeightsError, match="the disk is gone"):
            ticket.work[0].work[0].result(timeout=10)
        with pytest.raises(WeightsError, match="the disk is gone"):
            rig.transfer.wait(ticket)
        rig.transfer.cancel(ticket)
    seven = Part(0, 8, lambda memory: memory.__setitem__(slice(None), b"\7" * 8))
    rig.transfer.wait(rig.transfer.submit("unit", Scripted([seven]), 0))
    rig.transfer.close()
    assert rig.arena.tensor[:8].tolist() == [7] * 8


def test_a_cancelled_fill_is_dropped_if_nobody_began_it_and_finished_if_somebody_did() -> None:
    entered, gate, written = threading.Event(), threading.Event(), []
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU), num_threads=1)

    def begin(_: memoryview) -> None:
        written.append("begun")
        entered.set()
        gate.wait(10)

    begun = rig.transfer.submit("begun", Scripted([Part(0, 8, begin)]), 0)
    queued = rig.transfer.submit("queued", Scripted([Part(0, 8, lambda _: written.append("queued"))]), 0)
    assert entered.wait(10)
    rig.transfer.cancel(queued)
    gate.set()
    rig.transfer.cancel(begun)
    assert begun.work[0].work[0].done() and written == ["begun"]
    rig.transfer.close()
    assert written == ["begun"]
    assert has_ended("penstock-reader")


def test_a_fill_from_files_does_not_hold_up_the_one_before_it() -> None:
    """The copies of a fill wait for their own place to be free, not for that of a fill asked for later."""
    gate = threading.Event()
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    first = rig.transfer.submit("first", Scripted([Part(0, 8, lambda _: gate.wait(10) and None)]), 0)
    rig.api.compute.tick("the block before")  # what the second one has to wait for
    second = rig.transfer.submit("second", Scripted([Part(0, 8, lambda _: gate.set())]), PAGE)  # it is read first
    rig.transfer.wait(first)
    rig.transfer.wait(second)
    rig.transfer.close()
    assert rig.api.copies.operations == ["wait compute 0", "copy", "wait compute 1", "copy"]


def test_readers_take_the_device_of_the_transfer() -> None:
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    threads: list[int] = []
    parts = [Part(number * PAGE, PAGE, lambda _: threads.append(threading.get_ident())) for number in range(3)]
    rig.transfer.wait(rig.transfer.submit("unit", Scripted(parts), 0))
    rig.transfer.close()
    assert threads and all(rig.api.devices.get(thread) == GPU for thread in threads)


def test_drained_fills_do_not_keep_later_ones() -> None:
    gate, entered = threading.Event(), threading.Event()
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU), num_threads=1)
    rig.transfer.submit("first", Scripted([Part(0, 8, lambda _: entered.set() or (gate.wait(10) and None))]), 0)
    rig.transfer.submit("second", Scripted([Part(0, 8, lambda _: None)]), PAGE)
    assert entered.wait(10)
    gate.set()
    rig.transfer.drain()
    seven = Part(0, 8, lambda memory: memory.__setitem__(slice(None), b"\7" * 8))
    rig.transfer.wait(rig.transfer.submit("third", Scripted([seven]), 0))
    rig.transfer.close()
    assert rig.arena.tensor[:8].tolist() == [7] * 8


def test_seconds_are_those_of_the_device() -> None:
    """Of copies, of waits, of compute; the host has launched all of it before the device has begun."""
    api, timeline, store = Cuda(), Timeline(), HostStore(PAGE, is_pinned=False)
    rig = rig_of(api, Arena(8 * PAGE, CPU), timeline)
    stays = Stays(rig.transfer.clock, timeline)
    source = store.put(Scripted([]), PAGE)
    store.finish()
    api.is_busy = True
    begun = rig.transfer.clock.mark(api.copies)
    rig.transfer.submit("unit", source, 0)
    api.now_ms = 250.0
    stays.waited("unit", begun, rig.transfer.clock.mark())
    assert not timeline._spans  # nothing has passed, and nobody waited for it
    assert [(span.kind, round(span.duration_s, 6)) for span in timeline.spans] == [("fill", 0.0), ("wait", 0.25)]
    assert stays.waited_s == pytest.approx(0.25)
    rig.transfer.close()


def test_the_host_does_not_wait_for_copies_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(Cuda(), 1, "store", monkeypatch) as (pipeline, made, rig):
        rig.api.is_busy = True
        pipeline(num_steps=2)
        assert "copies" not in rig.api.host()
        assert made.transfer.busy_s == rig.transfer.busy_s
        assert "copies" in rig.api.host()  # asking for seconds waits
        assert 0 < rig.transfer.moved_bytes <= sum(stay.num_bytes for stay in made.timeline.residences)


def test_the_device_decides_on_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(PAGE, CPU)
    transfer = streamer._transfer(arena, None, None)
    assert isinstance(transfer, HostTransfer)
    transfer.close()

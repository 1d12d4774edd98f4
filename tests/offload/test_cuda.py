"""CUDA transfers without CUDA: every wait that correctness needs, and bytes through the ring of chunks."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.errors import GenerationError, WeightsError
from penstock.offload import chunks, streamer
from penstock.offload.cuda import CudaTransfer
from penstock.offload.gather import GatherTransfer
from penstock.offload.timing import Stays
from penstock.offload.transfer import HostTransfer
from penstock.timeline import Timeline
from penstock.weights import sources
from penstock.weights.host import HostStore
from penstock.weights.index import read_header
from penstock.weights.layout import packed
from penstock.weights.memory import Arena, HostMemory
from penstock.weights.ranges import Cast, FileRange, Piece
from penstock.weights.reader import FileReader
from penstock.weights.shards import ShardSource
from penstock.weights.sources import FileSource, Part
from tests.offload.races import Collectives, Cuda, Memory, WatchedArena
from tests.offload.toys import CPU, Pipeline, Scripted

PAGE = 4096
GPU = torch.device("cuda", 1)  # only its name: nothing here touches a device


class Chunk(HostMemory):
    """A chunk that knows who reads and writes it."""

    def __init__(self, num_bytes: int, api: Cuda, memory: Memory) -> None:
        super().__init__(num_bytes)
        self.api, self.memory, self.is_closed = api, memory, False

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


@dataclass
class Rig:
    """A transfer on a watched arena."""

    api: Cuda
    arena: Arena
    memory: Memory
    chunks: list[Chunk]
    transfer: CudaTransfer

    @property
    def races(self) -> list[tuple[str, str, str]]:
        """All that were found, on the arena and on the chunks."""
        return [*self.memory.races, *(race for chunk in self.chunks for race in chunk.memory.races)]


def rig_of(
    api: Cuda, arena: Arena, timeline: Timeline | None = None, device: torch.device = GPU, num_threads: int = 2
) -> Rig:
    memory, chunks, by_address = Memory(), [], {}

    def make_memory(num_bytes: int) -> HostMemory:
        chunk = Chunk(num_bytes, api, Memory())
        chunks.append(chunk)
        by_address[chunk.tensor.untyped_storage().data_ptr()] = chunk.memory
        return chunk

    watched: Any = WatchedArena(arena, api, memory, device=device)
    watched._chunks = by_address
    return Rig(api, arena, memory, chunks, CudaTransfer(watched, timeline, api, make_memory, num_threads))


class Sharer:
    """The only rank of those that hold weights together; what it gathers is a write of the current stream."""

    rank = 0
    size = 1

    def all_gather_into(self, whole: Any, own: Any, is_async: bool = False) -> None:
        whole.gathered(own)


@contextmanager
def streaming(
    api: Cuda,
    prefetch: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    sharers: Any = None,
    gathering: Any = GatherTransfer,
) -> Iterator[Any]:
    """A toy pipeline streamed by the real residency and stages, through a transfer on the fake CUDA."""
    rigs: list[Rig] = []

    def transfer(arena: Arena, timeline: Timeline | None, sharers: object) -> Any:
        rigs.append(rig_of(api, arena, timeline, CPU if way == "shards on it" else GPU))
        return rigs[0].transfer if sharers is None else gathering(rigs[0].transfer, timeline)

    monkeypatch.setattr(streamer, "_transfer", transfer)
    if way == "shards in files":
        monkeypatch.setattr(streamer, "is_in_memory", lambda _: False)
        monkeypatch.setattr(streamer, "let_go", lambda *_: None)
    pipeline = Pipeline()
    config = OffloadConfig(device="cpu", offload="layerwise", prefetch=prefetch, max_weight_memory="least")
    planned = plan_pipeline(pipeline, config, CPU, lambda *_: None)
    sharers = (sharers or Sharer()) if way.startswith("shards") else None
    settings = streamer.Settings(in_host_store=way not in ("ring", "shards in files"), sharers=sharers)
    made = streamer.Streamer(pipeline, planned.partition, planned.plan, settings, Timeline())
    made.install()
    with ExitStack() as undo:
        undo.callback(made.remove)
        for tenant in made.tenants:
            span = (tenant.plan.begin, tenant.plan.end)
            for module in tenant.unit.module.modules():
                if "weight" in module._parameters:  # what a kernel of this stream reads
                    undo.callback(module.register_forward_pre_hook(_reads(rigs[0], tenant.name, span)).remove)
        yield pipeline, made, rigs[0]


def _reads(rig: Rig, name: str, span: tuple[int, int]) -> Any:
    def read(*_: Any) -> None:
        rig.memory.access("R", name, span, rig.api.compute.tick(name))

    return read


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("which", ["free", "ready", "part"])
def test_without_one_of_the_waits_races_are_found(
    prefetch: int, way: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "part" and way not in ("shards in store", "shards in files"):
        return  # there is no part to wait for
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
    assert not any(thread.name.startswith("penstock-reader") for thread in threading.enumerate())


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


def test_copies_after_a_cancelled_gathering_come_behind_it() -> None:
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    transfer = GatherTransfer(rig.transfer)
    source = ShardSource(Scripted([Part(64, 8, lambda _: None)]), Sharer(), PAGE)
    transfer.cancel(transfer.submit("first", source, 0))  # compute has not waited for it
    transfer.wait(transfer.submit("second", Scripted([Part(0, 8, lambda _: None)]), 0))
    transfer.close()
    assert rig.races == []


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


class Counting(Sharer):
    """A rank of several; each gathering is noted as a launch on the communicator of shards."""

    def __init__(self, collectives: Collectives, number: int) -> None:
        self.collectives, self.number = collectives, number

    def all_gather_into(self, whole: Any, own: Any, is_async: bool = False) -> None:
        self.collectives.launch(self.number, "shard")
        super().all_gather_into(whole, own)


class OnReaders(GatherTransfer):
    """What this design replaced: a thread gathers when a part has been read, beside what the calling thread does.

    Of the first rank the reads are over before a block exchanges, of the others only then.
    """

    def __init__(self, own: Any, timeline: Timeline | None) -> None:
        super().__init__(own, timeline)
        self.pool, self.work, self.exchanged = ThreadPoolExecutor(1), [], threading.Event()
        self.is_late = False

    def submit(self, name: str, source: Any, begin: int) -> Any:
        ticket = super().submit(name, source, begin)
        self.exchanged.clear()
        self.work.append(self.pool.submit(self._gather))
        return ticket

    def _gather(self) -> None:
        if self.is_late:
            self.exchanged.wait(10)
        super()._launch()

    def _launch(self) -> None:
        self.exchanged.set()
        self.work.pop(0).result()

    def exchange(self) -> None:
        """The calling thread is about to exchange, or has."""
        if not self.is_late:
            for work in self.work:
                work.result()


@pytest.mark.parametrize("way", ["shards on it", "shards in store", "shards in files"])
@pytest.mark.parametrize("gathering", [GatherTransfer, OnReaders])
def test_all_ranks_launch_collectives_in_one_order(gathering: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if gathering is OnReaders and way != "shards in files":
        return  # nothing else was gathered by a thread that reads
    collectives = Collectives()
    for rank in range(2):
        sharer = Counting(collectives, rank)
        with streaming(Cuda(), 1, way, monkeypatch, sharer, gathering) as (pipeline, made, _):
            transfer = made.transfer
            transfer.is_late = rank > 0

            def exchange(*_: Any, rank: int = rank, transfer: Any = transfer) -> None:
                if isinstance(transfer, OnReaders):
                    transfer.exchange()
                collectives.launch(rank, "ulysses")
                if isinstance(transfer, OnReaders):
                    transfer.exchanged.set()

            for block in pipeline.transformer.blocks:
                block.linear.register_forward_pre_hook(exchange)
            pipeline(num_steps=2)
    assert {"shard", "ulysses"} == set(collectives.order(0)) and len(collectives.order(0)) > 20
    if gathering is OnReaders:
        assert collectives.failures[0] == "ranks 0 and 1" and "threads of rank 0" in collectives.failures
    else:
        assert collectives.failures == []


def test_another_unit_than_was_asked_for_is_seen_later_and_before_the_picture_is_given_away() -> None:
    api = Cuda()
    rig = rig_of(api, Arena(8 * PAGE, CPU))
    transfer = GatherTransfer(rig.transfer)

    class Apart(Sharer):
        rank = 1  # the first one stamps

        def all_gather_into(self, whole: Any, own: Any, is_async: bool = False) -> None:
            super().all_gather_into(whole, own)
            rig.arena.tensor[:8].view(torch.int64).fill_(zlib.crc32(self.gathers.encode()))

    sharer = Apart()
    source = ShardSource(Scripted([]), sharer, PAGE)
    source.__class__ = type("AtZero", (ShardSource,), {"begin": 0})  # the toy's only rank has all of the unit
    api.is_busy = True
    for sharer.gathers in ("block 1", "block 1", "block 2"):  # type: ignore[attr-defined]
        ticket = transfer.submit("block 1", source, 0)
        transfer.wait(ticket)  # the device is not there yet, and the host does not wait
    assert "exchanges" not in api.host()
    with pytest.raises(GenerationError, match="this rank gathers block 1, and the first of those it shares with"):
        transfer.check_fills(is_waiting=True)
    transfer.check_fills(is_waiting=True)
    transfer.close()

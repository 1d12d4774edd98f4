"""CUDA transfers without CUDA: every wait that correctness needs, and bytes through the ring of chunks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.errors import WeightsError
from penstock.offload import cuda, streamer
from penstock.offload.cuda import CudaTransfer
from penstock.offload.transfer import HostTransfer
from penstock.timeline import Timeline
from penstock.weights import sources
from penstock.weights.index import read_header
from penstock.weights.layout import packed
from penstock.weights.memory import Arena, HostMemory
from penstock.weights.ranges import Cast, FileRange, Piece
from penstock.weights.reader import FileReader
from penstock.weights.sources import FileSource, Part
from tests.offload.races import Cuda, Memory, WatchedArena
from tests.offload.toys import CPU, Pipeline, Scripted
from tests.waiting import has_ended

PAGE = 4096


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


def rig_of(api: Cuda, arena: Arena, timeline: Timeline | None = None) -> Rig:
    memory, chunks, by_address = Memory(), [], {}

    def make_memory(num_bytes: int) -> HostMemory:
        chunk = Chunk(num_bytes, api, Memory())
        chunks.append(chunk)
        by_address[chunk.tensor.untyped_storage().data_ptr()] = chunk.memory
        return chunk

    watched: Any = WatchedArena(arena, api, memory)
    watched._chunks = by_address
    return Rig(api, arena, memory, chunks, CudaTransfer(watched, timeline, api, make_memory))


class Sharer:
    """The only rank of those that hold weights together; what it gathers is a write of the current stream."""

    rank = 0
    size = 1

    def all_gather_into(self, whole: Any, own: torch.Tensor) -> None:
        whole.copy_(own, non_blocking=True)


@contextmanager
def streaming(api: Cuda, prefetch: int, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A toy pipeline streamed by the real residency and stages, through a transfer on the fake CUDA."""
    rigs: list[Rig] = []

    def transfer(arena: Arena, timeline: Timeline | None, sharers: object) -> CudaTransfer:
        rigs.append(rig_of(api, arena, timeline))
        return rigs[0].transfer

    monkeypatch.setattr(streamer, "_transfer", transfer)
    pipeline = Pipeline()
    config = OffloadConfig(device="cpu", offload="layerwise", prefetch=prefetch, max_weight_memory="least")
    planned = plan_pipeline(pipeline, config, CPU, lambda *_: None)
    settings = streamer.Settings(in_host_store=way != "ring", sharers=Sharer() if way == "shards" else None)
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


@pytest.mark.parametrize("way", ["store", "ring", "shards"])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_fill_and_no_read_race(prefetch: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pipeline()(num_steps=3)
    with streaming(Cuda(), prefetch, way, monkeypatch) as (pipeline, made, rig):
        for _ in range(2):
            assert torch.equal(pipeline(num_steps=3), expected)
        assert made.residency.num_fills >= 6 * 6
        assert rig.races == []


@pytest.mark.parametrize("way", ["store", "ring", "shards"])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize(
    ("dropped", "kind"), [("copies waits", "W after R"), ("compute waits", "R after W")], ids=["free", "ready"]
)
def test_without_one_of_the_waits_races_are_found(
    prefetch: int, way: str, dropped: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streaming(Cuda(dropped), prefetch, way, monkeypatch) as (pipeline, _, rig):
        pipeline(num_steps=3)
        assert kind in {race[0] for race in rig.races}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page per part and two per chunk, so that little goes round the ring."""
    monkeypatch.setattr(sources, "PART_BYTES", PAGE)
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", 2 * PAGE)


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
    assert len(rig.chunks) == cuda._NUM_CHUNKS and rig.races == []
    fills = [span for span in timeline.spans if span.kind == "fill"]
    assert sum(span.num_bytes for span in fills) == rig.transfer.moved_bytes
    assert rig.transfer.moved_bytes >= 3 * sum(weight.nbytes for weight in weights.values())
    assert all(0 < span.num_bytes <= 2 * PAGE and span.lane == "copy stream" for span in fills)
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


def test_neighbours_share_a_chunk_and_gaps_do_not_grow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", 100)
    parts = [Part(begin, size, print) for begin, size in [(0, 40), (40, 60), (100, 1), (190, 20), (500, 100)]]
    assert [[part.position for part in group] for group in cuda._groups(parts)] == [[0, 40], [100], [190], [500]]
    assert list(cuda._groups([])) == []


@pytest.mark.usefixtures("small_chunks")
def test_errors_of_the_reader_reach_the_caller_and_cost_no_chunk() -> None:
    def fail(_: memoryview) -> None:
        raise WeightsError("the disk is gone")

    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    for _ in range(3 * cuda._NUM_CHUNKS):  # a ring that lost its chunks would wait for ever
        ticket = rig.transfer.submit("unit", Scripted([Part(0, 8, lambda _: None), Part(PAGE, 8, fail)]), 0)
        with pytest.raises(WeightsError, match="the disk is gone"):
            ticket.work[0].result(timeout=10)
        with pytest.raises(WeightsError, match="the disk is gone"):
            rig.transfer.wait(ticket)
        rig.transfer.cancel(ticket)
    seven = Part(0, 8, lambda memory: memory.__setitem__(slice(None), b"\7" * 8))
    rig.transfer.wait(rig.transfer.submit("unit", Scripted([seven]), 0))
    rig.transfer.close()
    assert rig.arena.tensor[:8].tolist() == [7] * 8


def test_a_cancelled_fill_is_dropped_if_nobody_began_it_and_finished_if_somebody_did() -> None:
    gate, written = threading.Event(), []
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    begun = rig.transfer.submit("begun", Scripted([Part(0, 8, lambda _: written.append("begun") or gate.wait(10))]), 0)
    queued = rig.transfer.submit("queued", Scripted([Part(0, 8, lambda _: written.append("queued"))]), 0)
    threading.Timer(0.02, gate.set).start()
    rig.transfer.cancel(queued)
    rig.transfer.cancel(begun)
    assert begun.work[0].done() and written == ["begun"]
    rig.transfer.close()
    assert written == ["begun"]
    assert has_ended("penstock-reader")


def test_a_fill_from_files_does_not_hold_up_the_one_before_it() -> None:
    """The copies of a fill wait for their own place to be free, not for that of a fill asked for later."""
    gate = threading.Event()
    rig = rig_of(Cuda(), Arena(8 * PAGE, CPU))
    first = rig.transfer.submit("first", Scripted([Part(0, 8, lambda _: gate.wait(10) and None)]), 0)
    rig.api.compute.tick("the block before")  # what the second one has to wait for
    second = rig.transfer.submit("second", Scripted([Part(0, 8, lambda _: None)]), PAGE)
    gate.set()
    rig.transfer.wait(first)
    rig.transfer.wait(second)
    rig.transfer.close()
    assert rig.api.copies.operations == ["wait compute 0", "copy", "wait compute 1", "copy"]


def test_the_host_does_not_wait_for_copies_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(Cuda(), 1, "store", monkeypatch) as (pipeline, made, rig):
        pipeline(num_steps=2)
        assert "copies" not in rig.api.host()
        assert made.transfer.busy_s > 0 and rig.transfer.busy_s == made.transfer.busy_s
        assert "copies" in rig.api.host()  # asking for seconds waits
        assert 0 < rig.transfer.moved_bytes <= sum(stay.num_bytes for stay in made.timeline.residences)


def test_the_device_decides_on_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(PAGE, CPU)
    transfer = streamer._transfer(arena, None, None)
    assert isinstance(transfer, HostTransfer)
    transfer.close()

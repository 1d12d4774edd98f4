"""A transfer to CUDA without CUDA: put together on the fake device, whose streams and memory are watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.offload import streamer
from penstock.offload.cuda import CudaTransfer
from penstock.offload.gather import GatherTransfer
from penstock.timeline import Timeline
from penstock.weights.memory import Arena, HostMemory
from tests.offload.races import Cuda, Memory, WatchedArena
from tests.offload.toys import CPU, Pipeline

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

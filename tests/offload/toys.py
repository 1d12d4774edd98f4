"""A toy pipeline that streams, and the parts of the streamer put together around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.offload.residency import Residency, Tenant
from penstock.offload.streamer import Settings, Streamer
from penstock.offload.timing import HostClock
from penstock.offload.transfer import Ticket
from penstock.offload.units import Unit, Weight
from penstock.plan import UnitPlan
from penstock.timeline import Timeline
from penstock.weights.layout import paged
from penstock.weights.memory import Arena
from penstock.weights.proof import Proof
from penstock.weights.ranges import HostRange, Piece, memory_of
from penstock.weights.sources import HostSource, Part, SourceKind

WIDTH = 16
CPU = torch.device("cpu")


class Block(nn.Module):
    """A linear layer and its activation; `inner` is called where it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.inner: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        return x if self.inner is None else self.inner(x)


class Denoiser(nn.Module):
    """Blocks between two layers; `order` says which blocks run, and how often."""

    def __init__(self, num_blocks: int = 6) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.order: Sequence[int] = range(num_blocks)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.entry(x) + timestep / 1000
        for number in self.order:
            x = self.blocks[number](x)
        return self.head(x)


class Decoder(nn.Module):
    """Is used by its method, as a VAE is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z)


class Pipeline:
    """Denoises with a scheduler of diffusers, `calls` times per step, then decodes."""

    def __init__(self, num_blocks: int = 6, calls: int = 1) -> None:
        torch.manual_seed(0)
        self.transformer = Denoiser(num_blocks).eval()
        self.vae = Decoder().eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.calls = calls

    @torch.no_grad()
    def __call__(self, num_steps: int = 3) -> torch.Tensor:
        x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
        self.scheduler.set_timesteps(num_steps)
        for t in self.scheduler.timesteps:
            noise = sum(self.transformer(x, t) for _ in range(self.calls)) / self.calls
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        return self.vae.decode(x)


@contextmanager
def streamed(
    pipeline: Any, prefetch: int | None = 1, budget: str = "least", is_checked: bool = False, **options: Any
) -> Iterator[Streamer]:
    """Stream a pipeline on the CPU, each weight from memory, with a timeline."""
    mode, sharers = options.pop("offload", "layerwise"), options.pop("sharers", None)
    config = OffloadConfig(device="cpu", offload=mode, prefetch=prefetch, max_weight_memory=budget)
    planned = plan_pipeline(pipeline, config, CPU, lambda *_: None, **options)
    settings = Settings(is_checked=is_checked, sharers=sharers)
    streamer = Streamer(pipeline, planned.partition, planned.plan, settings, Timeline())
    streamer.install()
    try:
        yield streamer
    finally:
        streamer.remove()


class Scripted:
    """A source whose parts do what a test says."""

    kind: SourceKind = "host"

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.checks: list[str] = []
        self.error: Exception | None = None

    def check(self) -> None:
        """Raise what the test wants."""
        self.checks.append("checked")
        if self.error is not None:
            raise self.error


class Deferred:
    """A transfer that fills only when it is waited for, and notes what it was asked."""

    moved_bytes = 0
    busy_s = lane_s = 0.0
    unpinned_bytes = 0
    clock = HostClock()
    is_seen_by_torch = False
    done = False

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.log: list[str] = []
        self.errors: list[BaseException] = []

    def submit(self, name: str, source: Any, begin: int) -> Ticket:
        """Note it."""
        self.log.append(f"submit {name}")
        return Ticket(name, (source, begin))

    def wait(self, ticket: Ticket) -> None:
        """Fill, or raise the next error."""
        self.log.append(f"wait {ticket.name}")
        if self.errors:
            raise self.errors.pop(0)
        source, begin = ticket.work
        assert self.arena.host is not None
        for part in source.parts:
            first = begin + part.position
            part.write(self.arena.host.view[first : first + part.num_bytes])

    def cancel(self, ticket: Ticket) -> None:
        """Note it."""
        self.log.append(f"cancel {ticket.name}")

    def is_done(self, ticket: Ticket) -> bool:
        """As the test says."""
        return self.done

    def drain(self) -> None:
        """Note it."""
        self.log.append("drain")

    def restart(self) -> None:
        """Note it."""
        self.log.append("restart")

    def close(self) -> None:
        """Nothing to end."""


class Holder(nn.Module):
    """One weight whose values are all the same number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), float(number)))


def residency_of(
    begins: Sequence[int], is_checked: bool = False, timeline: Timeline | None = None
) -> tuple[Residency, Deferred, list[Tenant]]:
    """Units `0`, `1`, ... of one page each, at these pages of the arena; unit n holds the number n."""
    tenants = []
    for number, begin in enumerate(begins):
        module = Holder(number)
        weight = Weight(f"{number}.weight", module._parameters, "weight", module.weight, torch.float32, piece=0)
        pieces = [Piece(HostRange(memory_of(module.weight)), None, 4)]
        layout = paged(pieces)
        plan = UnitPlan(
            name=str(number), component="toy", num_bytes=layout.num_bytes, begin=4096 * begin, residency="streamed"
        )
        unit = Unit(str(number), "toy", module, [weight], pieces)
        tenants.append(Tenant(unit, plan, layout, HostSource(pieces, layout)))
    arena = Arena(4096 * (max(begins) + 1), CPU)
    transfer = Deferred(arena)
    residency = Residency(tenants, arena, transfer, Proof(arena) if is_checked else None, timeline)
    residency.install()
    return residency, transfer, tenants

"""Streams of made-up ranks, and tensors that lie in them."""

from __future__ import annotations

import torch

from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh
from penstock.distributed.sequence.streams import Streams


def streams_of(rank: int, ulysses: int, ring: int = 1, whole: tuple[str, ...] = (), **lengths: int) -> Streams:
    """The streams of a rank that cannot exchange anything."""
    group = Group("sequence", rank, tuple(range(ulysses * ring)), None)
    inner = Group("ulysses", rank % ulysses, tuple(range(ulysses)), None)
    streams = Streams(group, inner, Group("ring", rank // ulysses, tuple(range(ring)), None), whole, "Painter")
    streams.lengths.update(lengths)
    return streams


def streams_on(mesh: Mesh, whole: tuple[str, ...] = (), **lengths: int) -> Streams:
    """The streams of this rank of a mesh."""
    streams = Streams(mesh["sequence"], mesh["ulysses"], mesh["ring"], whole, "Painter")
    streams.lengths.update(lengths)
    return streams


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

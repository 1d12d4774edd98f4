"""Operations on strips against the same on one rank, many in one job."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.distributed.group import Group
from penstock.distributed.patch.autoencoder import put_together
from penstock.distributed.patch.layout import Layout
from penstock.distributed.patch.strip import Exchange, Strip

Function = Callable[[Tensor], Any]
BORDERS = {2: (0, 6, 16), 3: (0, 6, 8, 16), 4: (0, 2, 6, 8, 16)}
"""Of 16 rows, uneven on purpose."""


def group_of_all(kind: type[Group] = Group) -> Group:
    world_size = dist.get_world_size()
    return kind("vae", dist.get_rank(), tuple(range(world_size)), dist.group.WORLD)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(num_dims: int = 4, dim: int = 2) -> Tensor:
    """(2, 4, ..., 6) with 16 rows in one dimension."""
    shape = [2, 4, *[6] * (num_dims - 2)]
    shape[dim] = 16
    return draw(*shape)


def strip_of(tensor: Tensor, dim: int, group: Group | None = None) -> Strip:
    group = group or group_of_all()
    return Exchange(group).strip(tensor, Layout.of(dim, BORDERS[group.size]))


def compared(function: Function, tensor: Tensor, dim: int) -> tuple[float, bool]:
    """How far the result on strips is from that on one rank, by its own size, and whether it never ran whole."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = function(tensor)
        strip = strip_of(tensor, dim)
        result = put_together(function(strip))
    if not isinstance(expected, Tensor):
        expected, result = torch.cat([part.flatten() for part in expected]), torch.cat([p.flatten() for p in result])
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert type(result) is Tensor
    scale = max(float(expected.double().abs().max()), 1e-6)
    return float((result.double() - expected.double()).abs().max()) / scale, not strip.exchange.whole


class Deaf(Group):
    """Hears nothing of other ranks."""

    def trade(self, sent: Any, received: Any) -> None:
        for tensor, _ in received:
            tensor.zero_()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor for _ in self.ranks]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

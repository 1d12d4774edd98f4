"""Small models with odd weights, and what the tests of sharding share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.distributed.hsdp.config import HSDPInferenceConfig
from tests.zoo.denoisers.case import noise

WIDTH = 48


def config(**options: Any) -> HSDPInferenceConfig:
    """Sharding that casts nothing."""
    return HSDPInferenceConfig(**{"enabled": True, "param_dtype": None, **options})


class Block(nn.Module):
    """A block with a list in it, whose elements have numbers for names."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_in = nn.Linear(width, 2 * width)
        self.to_out = nn.ModuleList([nn.Linear(2 * width, width), nn.Dropout()])

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.to_in.weight.dtype)
        return tokens + self.to_out[1](self.to_out[0](torch.tanh(self.to_in(tokens))))


class Toy(nn.Module):
    """Blocks between an embedder and a head."""

    def __init__(self, blocks: Iterable[nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens.to(self.embed.weight.dtype))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.to(self.head[0].weight.dtype))


def toy(make: Callable[[], nn.Module] = Block, num_blocks: int = 3, kind: type[Toy] = Toy, width: int = WIDTH) -> Toy:
    """A toy with seeded weights, ready for inference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind([make() for _ in range(num_blocks)], width).eval()


def tokens() -> Tensor:
    """Inputs of a toy: (2, 6, 8)."""
    return noise("toy", 2, 6, 8)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a toy makes of `tokens`."""
    made: Tensor = model(tokens())
    return made


def held_bytes() -> int:
    """Bytes of all storages that any tensor of this process keeps alive, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            tensor = found._local_tensor if type(found) is DTensor or isinstance(found, DTensor) else found
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each once; of shards what is on this rank."""
    unique = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes for tensor in unique.values())

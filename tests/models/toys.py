"""Hand-made modules and pipelines for the rules of discovery."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """One linear layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class OtherBlock(Block):
    """Another class of block."""


class Denoiser(nn.Module):
    """Takes a timestep, has two stacks, a top-level parameter and a top-level buffer."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.single_blocks = nn.ModuleList(OtherBlock() for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.zeros(4, dtype=torch.int64))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.single_blocks]:
            x = block(x)
        return self.head(x) * self.scale


class Encoder(nn.Module):
    """Takes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


class Decoder(nn.Module):
    """Decodes, as a VAE does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z)


class Embedder(nn.Module):
    """Neither of these."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Pipeline:
    """A pipeline that is no diffusers pipeline and declares nothing."""

    def __init__(self) -> None:
        self.mllm = Encoder()
        self.gen_transformer = Denoiser()
        self.decoder = Decoder()
        self.time_embedder = Embedder()
        self.name = "toy"

    def __call__(self, prompt: str, num_steps: int = 2) -> None:
        """Never run."""

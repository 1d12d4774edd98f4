"""Where the bytes of a weight are: a range of a file, or a range of this process's memory.

Nouns of the streamer's lowest level; they know no modules and no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

ALIGNMENT_BYTES = 256
"""Weights begin at multiples of this on an accelerator, and never at 0, as its kernels and compilers like it."""
PAGE_BYTES = 4096
"""Unit of direct reads: of the address, the offset in the file, and the length."""
CACHE_LINE_BYTES = 64
"""What the CPU's allocator aligns tensors to."""


@dataclass(frozen=True)
class FileRange:
    """`num_bytes` bytes of a file from `offset`."""

    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class HostRange:
    """Bytes in host memory, as a flat uint8 tensor that keeps them alive; they may lie in a mapped file."""

    memory: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.memory.numel()


@dataclass(frozen=True)
class Unread:
    """Bytes that will come from a checkpoint but are not there yet: enough to plan with."""

    num_bytes: int


Range = FileRange | HostRange | Unread


@dataclass(frozen=True)
class Cast:
    """A change of dtype on the way to the device."""

    stored: torch.dtype
    wanted: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A run of bytes that belongs together on the device: one tensor, or several that share memory.

    Attributes:
        range: where the bytes are.
        cast: how they change on the way, or None for a copy.
        itemsize: bytes of one element; addresses on the device are multiples of it.
    """

    range: Range
    cast: Cast | None = None
    itemsize: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        if self.cast is None:
            return self.range.num_bytes
        return self.range.num_bytes // self.cast.stored.itemsize * self.cast.wanted.itemsize


def memory_of(tensor: torch.Tensor, begin: int = 0, num_bytes: int | None = None) -> torch.Tensor:
    """The bytes of a tensor's storage from `begin` on, as a flat uint8 tensor that shares them."""
    storage = tensor.untyped_storage()
    length = storage.nbytes() - begin if num_bytes is None else num_bytes
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return memory.set_(storage, begin, (length,), (1,))


def align(num_bytes: int, to: int) -> int:
    """`num_bytes` rounded up to a multiple of `to`."""
    return -(-num_bytes // to) * to

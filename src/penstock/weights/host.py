"""Host memory for weights that a device takes from there: one arena of the exact size, pinned where that helps.

A unit lies in it as it will lie on the device, so that one copy moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from penstock.weights.memory import HostMemory
from penstock.weights.sources import Part, Source, SourceKind

_THREADS = 4


class HostStore:
    """Packed units in host memory.

    Args:
        num_bytes: of all units that will be put in.
        is_pinned: for CUDA.
    """

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self._memory = HostMemory(num_bytes, is_pinned)
        self._used = 0

    def put(self, source: Source, num_bytes: int) -> StoredSource:
        """Read a unit into the store.

        Args:
            source: reads it; its positions are those that the unit has on the device.
            num_bytes: of the unit.

        Raises:
            WeightsError: for what the readers meet.
        """
        begin, end = self._used, self._used + num_bytes
        view = self._memory.view[begin:end]
        with ThreadPoolExecutor(_THREADS) as pool:
            for future in [pool.submit(_write, part, view) for part in source.parts]:
                future.result()
        self._used = end
        return StoredSource(self._memory.tensor[begin:end])

    def close(self) -> None:
        """Give the pinning back."""
        self._memory.close()


class StoredSource:
    """A unit in the host store.

    Attributes:
        memory: the packed unit, pinned where the store is.
    """

    kind: SourceKind = "host"

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    @property
    def parts(self) -> Sequence[Part]:
        """One part: all of it."""
        return [Part(0, self.memory.numel(), self._write)]

    def check(self) -> None:
        """Memory does not change behind our back."""

    def _write(self, view: memoryview) -> None:
        torch.frombuffer(view, dtype=torch.uint8).copy_(self.memory)


def _write(part: Part, view: memoryview) -> None:
    part.write(view[part.position : part.position + part.num_bytes])

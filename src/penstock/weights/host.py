"""Memory for weights that a device takes from there: of the exact size, on the host (pinned where that helps) or, for
the parts of sharded weights, on the device itself.

A unit lies in it as it will lie in its place, so that one copy (or one gathering) moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from penstock.weights.memory import HostMemory, take_device
from penstock.weights.sources import Part, Source, SourceKind

_THREADS = 4

Progress = Callable[[int, int], None]
"""(bytes read so far, bytes in all); called as they arrive."""


@dataclass(frozen=True)
class Common:
    """Memory that processes of one machine keep together, because all of them put the same into it.

    Attributes:
        file: descriptor of a file in memory, open in all of them.
        rank: this process among them.
        size: how many they are.
    """

    file: int
    rank: int
    size: int


class HostStore:
    """Packed units, or this rank's parts of them, in memory.

    Args:
        num_bytes: of all that will be put in.
        is_pinned: for CUDA.
        device: where they stay; on another device than the host's, they are in host memory only while they are read.
        copied_to: the device that they are copied to from there; that one if left out.
        common: where several processes keep the same, once for all of them. Each reads a part: all of it is there once
            `finish` has returned in all.

    Attributes:
        tensor: all of it.
        num_sharers: processes that keep it together.
        unpinned_bytes: that CUDA refused to pin.
    """

    def __init__(
        self,
        num_bytes: int,
        is_pinned: bool,
        device: torch.device | None = None,
        common: Common | None = None,
        copied_to: torch.device | None = None,
    ) -> None:
        self._rank, self.num_sharers = (common.rank, common.size) if common is not None else (0, 1)
        file = common.file if common is not None else None
        self._memory: HostMemory | None = HostMemory(num_bytes, is_pinned, file, copied_to or device)
        self.unpinned_bytes = self._memory.unpinned_bytes
        self._num_parts = 0
        self.tensor = self._memory.tensor
        self._device = device or torch.device("cpu")
        self._used = 0
        self._pool = ThreadPoolExecutor(
            _THREADS, thread_name_prefix="penstock-loader", initializer=take_device, initargs=(copied_to or device,)
        )
        self._work: dict[Future[None], int] = {}

    def put(self, source: Source, num_bytes: int) -> StoredSource:
        """Begin to read a unit into the store; it is there after `finish`.

        Args:
            source: reads it; its positions are those that the unit has in its place.
            num_bytes: of the unit.
        """
        assert self._memory is not None
        begin, end = self._used, self._used + num_bytes
        view = self._memory.view[begin:end]
        for part in source.parts:
            self._num_parts += 1
            if self._num_parts % self.num_sharers == self._rank:
                self._work[self._pool.submit(_write, part, view)] = part.num_bytes
        self._used = end
        return StoredSource(self, begin, end)

    def finish(self, on_progress: Progress | None = None) -> None:
        """Wait until all that this process reads is there, on the device that it stays on.

        Raises:
            WeightsError: for what the readers meet; nothing is read on.
        """
        total, done = sum(self._work.values()), 0
        try:
            for future in as_completed(self._work):
                future.result()
                done += self._work[future]
                if on_progress is not None:
                    on_progress(done, total)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._work.clear()
        if self._device.type != "cpu" and self._memory is not None:
            with torch.inference_mode(False):
                self.tensor = self.tensor.to(self._device)
            self._memory.close()
            self._memory = None

    def close(self) -> None:
        """Give the pinning back."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._memory is not None:
            self._memory.close()


class StoredSource:
    """A unit in the store."""

    kind: SourceKind = "host"

    def __init__(self, store: HostStore, begin: int, end: int) -> None:
        self._store = store
        self._begin = begin
        self._end = end

    @property
    def memory(self) -> torch.Tensor:
        """The packed unit, pinned where the store is."""
        return self._store.tensor[self._begin : self._end]

    @property
    def parts(self) -> Sequence[Part]:
        """One part: all of it."""
        return [Part(0, self._end - self._begin, self._write)]

    def check(self) -> None:
        """Memory does not change behind our back."""

    def _write(self, view: memoryview) -> None:
        torch.frombuffer(view, dtype=torch.uint8).copy_(self.memory)


def _write(part: Part, view: memoryview) -> None:
    part.write(view[part.position : part.position + part.num_bytes])

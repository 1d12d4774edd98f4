"""Memory of an exact size that is allocated once: the device's arena, and pinned memory of the host.

torch's own pinned allocator rounds up to powers of two (38 GiB become 64); here an anonymous mapping of the exact
size is registered with the driver instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from penstock.errors import ModelError
from penstock.weights.ranges import PAGE_BYTES, align

POISON = 0xFF
"""A byte that makes NaN of every float dtype that checkpoints hold."""


def room_for(num_bytes: int) -> int:
    """Bytes in whole pages, one at least."""
    return max(align(num_bytes, PAGE_BYTES), PAGE_BYTES)


class HostMemory:
    """Page-aligned memory of the host, exactly sized to whole pages.

    Args:
        num_bytes: its size.
        is_pinned: register it with CUDA, so that copies to the device run beside compute. Where the driver
            refuses (limits of a container, WSL), it stays pageable, with a warning. The registration ends with
            `close`, or with this object.
        file: descriptor of a file in memory that other processes map as well; it may be closed afterwards.
        device: that copies go to; no other device is touched. The current one if left out.

    Attributes:
        tensor: all of it, as uint8.
        view: the same as a writable memoryview.
        is_pinned: whether it really is.
        unpinned_bytes: that CUDA refused to pin.
    """

    def __init__(
        self, num_bytes: int, is_pinned: bool = False, file: int | None = None, device: torch.device | None = None
    ) -> None:
        size = room_for(num_bytes)
        if file is None:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork gets one of its own
        else:
            self._map = mmap.mmap(file, size, flags=mmap.MAP_SHARED)
        self.view = memoryview(self._map)
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device = device
        self.unpinned_bytes = 0
        self.is_pinned = is_pinned and self._register()

    def _register(self) -> bool:
        address, num_bytes = self.tensor.data_ptr(), self.tensor.numel()
        with on_device(self._device):
            code = int(_driver().cudaHostRegister(address, num_bytes, 0))
            if code == 0:
                self._unregister = weakref.finalize(self, _unregister, address, self._device, os.getpid())
                self._unregister.atexit = False  # it ends with the process anyway
                return True
            _clear_error(self._device)
        self.unpinned_bytes = num_bytes
        warnings.warn(
            f"CUDA refused to pin {num_bytes} bytes of host memory (error {code}): copies to the device "
            "will be slower and will not overlap with compute. Raise the limit of locked memory (ulimit -l).",
            UserWarning,
            stacklevel=4,
        )
        return False

    def close(self) -> None:
        """Give the registration back; the memory itself lives as long as tensors refer to it."""
        if self.is_pinned:
            self._unregister()
            self.is_pinned = False


class Arena:
    """The device's memory for weights: one allocation, in which every unit has its place for ever.

    Args:
        num_bytes: its size.
        device: where.

    Raises:
        ModelError: where the device has no room for it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.host: HostMemory | None = None
        try:
            if device.type == "cpu":
                self.host = HostMemory(num_bytes)
                self.tensor = self.host.tensor[:num_bytes]
            else:
                with torch.inference_mode(False):
                    self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except (torch.OutOfMemoryError, OSError, MemoryError) as error:
            raise ModelError(
                f"{device} has no room for {num_bytes} bytes of weights: {error}. Ask for a smaller "
                "--max-weight-memory."
            ) from error

    def poison(self, begin: int, num_bytes: int) -> None:
        """Overwrite a range with NaN, so that a read of weights that are no longer there shows."""
        self.tensor[begin : begin + num_bytes].fill_(POISON)


def _driver() -> Any:
    cudart: Any = torch.cuda.cudart
    return cudart()


def on_device(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which a CUDA device is this thread's current one."""
    is_cuda = device is not None and device.type == "cuda"
    return torch.cuda.device(device) if is_cuda else contextlib.nullcontext()


def take_device(device: torch.device | None, api: Any = torch.cuda) -> None:
    """Make a CUDA device the current one of this thread, which begins with the first, whichever its process uses."""
    if device is not None and device.type == "cuda":
        api.set_device(device)


def _unregister(address: int, device: torch.device | None, process: int) -> None:
    if os.getpid() == process:  # a child has no CUDA, and its copy of the memory is not registered
        with on_device(device):
            _driver().cudaHostUnregister(address)


def _clear_error(device: torch.device | None) -> None:
    """Have CUDA forget that a call failed: torch would raise it at the next launch, whatever that is.

    torch's binding has no `cudaGetLastError`; the runtime that torch has loaded has it.
    """
    library = _runtime()
    if library is not None:
        library.cudaGetLastError()
    else:
        with contextlib.suppress(RuntimeError):  # the launch that raises it, and so clears it
            torch.zeros(1, device=device or "cuda")


def _runtime() -> Any:
    """CUDA's runtime as this process has it loaded; None where that is not a library of its own."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libcudart.so"):
            return ctypes.CDLL(path)
    return None

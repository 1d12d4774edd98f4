"""Memory of an exact size, in the host and for the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.errors import ModelError
from penstock.weights import memory
from penstock.weights.memory import Arena, HostMemory, take_device
from penstock.weights.ranges import PAGE_BYTES

CPU = torch.device("cpu")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e8m0fnu]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "given"),
    [(0, PAGE_BYTES), (1, PAGE_BYTES), (PAGE_BYTES, PAGE_BYTES), (PAGE_BYTES + 1, 2 * PAGE_BYTES)],
)
def test_host_memory_is_whole_pages_and_no_more(asked: int, given: int) -> None:
    host = HostMemory(asked)
    assert host.tensor.numel() == len(host.view) == given
    assert host.tensor.data_ptr() % PAGE_BYTES == 0
    assert not host.is_pinned


def test_the_view_and_the_tensor_are_the_same_memory_and_outlive_their_owner() -> None:
    host = HostMemory(10)
    tensor, view = host.tensor, host.view
    view[3:5] = b"\x07\x08"
    host.close()
    del host
    assert tensor[2:6].tolist() == [0, 7, 8, 0]


@pytest.mark.parametrize("num_bytes", [0, 1, 5000, 3 * PAGE_BYTES])
def test_an_arena_has_exactly_the_bytes_asked_for(num_bytes: int) -> None:
    arena = Arena(num_bytes, CPU)
    assert arena.num_bytes == arena.tensor.numel() == num_bytes
    assert arena.host is not None
    assert arena.host.tensor.data_ptr() % PAGE_BYTES == 0


def test_an_arena_on_another_device_has_no_host_memory() -> None:
    arena = Arena(5000, torch.device("meta"))
    assert (arena.host, arena.tensor.numel(), arena.tensor.device.type) == (None, 5000, "meta")


def test_memory_made_in_inference_mode_can_be_written_outside() -> None:
    with torch.inference_mode():
        arena, host = Arena(8, CPU), HostMemory(8)
    arena.tensor.fill_(1)
    host.tensor.fill_(1)
    assert not arena.tensor.is_inference() and not host.tensor.is_inference()


def test_an_arena_larger_than_any_memory_is_refused_with_its_size() -> None:
    with pytest.raises(ModelError, match=rf"cpu has no room for {2**60} bytes of weights: .*--max-weight-memory"):
        Arena(2**60, CPU)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poison_is_nan_in_every_float_dtype_and_only_in_its_range(dtype: torch.dtype) -> None:
    arena = Arena(256, CPU)
    arena.poison(64, 128)
    numbers = arena.tensor.view(dtype).to(torch.float32).isnan()
    first, last = 64 // dtype.itemsize, 192 // dtype.itemsize
    assert numbers[first:last].all()
    assert not numbers[:first].any() and not numbers[last:].any()


class Driver:
    """What CUDA's runtime is to a machine that has one: notes what is registered, and keeps its last error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.code = code
        self.last_error = 0
        self.calls: list[tuple[str, int]] = []
        self.devices: list[torch.device | None] = []
        monkeypatch.setattr(memory, "_driver", lambda: self)
        monkeypatch.setattr(memory, "_runtime", lambda: self)
        monkeypatch.setattr(memory, "on_device", self.current)

    @contextmanager
    def current(self, device: torch.device | None) -> Iterator[None]:
        """Stands in for `torch.cuda.device`."""
        self.devices.append(device)
        yield

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("register", num_bytes))
        self.last_error = self.code
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0

    def cudaGetLastError(self) -> int:
        error, self.last_error = self.last_error, 0
        return error


def test_pinning_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    host = HostMemory(PAGE_BYTES + 1, is_pinned=True, device=torch.device("cuda", 3))
    assert host.is_pinned and not host.unpinned_bytes
    host.close()
    host.close()
    assert not host.is_pinned
    assert driver.calls == [("register", 2 * PAGE_BYTES), ("unregister", host.tensor.data_ptr())]
    assert driver.devices == [torch.device("cuda", 3)] * 2  # whichever device the thread uses


def test_pinning_is_given_back_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    host = HostMemory(PAGE_BYTES, is_pinned=True)
    tensor = host.tensor
    del host
    assert driver.calls == [("register", PAGE_BYTES), ("unregister", tensor.data_ptr())]
    tensor.fill_(1)  # the memory itself is there as long as anybody has it


def test_a_child_process_gives_back_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    host = HostMemory(PAGE_BYTES, is_pinned=True)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    host.close()
    assert driver.calls == [("register", PAGE_BYTES)]


def test_memory_that_cannot_be_pinned_is_used_as_it_is_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, code=2)
    with pytest.warns(UserWarning, match=rf"refused to pin {PAGE_BYTES} bytes .*error 2.: .*ulimit -l"):
        host = HostMemory(100, is_pinned=True)
    assert driver.last_error == 0  # torch would raise it at its next launch, wherever that is
    assert host.unpinned_bytes == PAGE_BYTES
    host.close()
    assert not host.is_pinned
    assert driver.calls == [("register", PAGE_BYTES)]


def test_where_the_runtime_is_no_library_a_launch_clears_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, code=2)
    monkeypatch.setattr(memory, "_runtime", lambda: None)
    launched = []

    def zeros(size: int, device: object) -> None:
        launched.append(device)
        driver.last_error = 0
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.warns(UserWarning, match="refused to pin"):
        HostMemory(100, is_pinned=True, device=torch.device("cuda", 1))
    assert launched == [torch.device("cuda", 1)] and driver.last_error == 0


def test_the_runtime_is_found_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._runtime() is None  # this process has none
    loaded, driver = [], object()
    maps = "7f00-7f01 r-xp 00000000 fe:00 12 /lib/libc.so.6\n7f02-7f03 r-xp 0 fe:00 9 /opt/cu 13/libcudart.so.13\n"
    monkeypatch.setattr(Path, "read_text", lambda _: maps)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda path: loaded.append(path) or driver)  # type: ignore[attr-defined]
    assert memory._runtime() is driver
    assert loaded == ["/opt/cu 13/libcudart.so.13"]


def test_a_thread_takes_the_device_of_its_process() -> None:
    chosen: list[torch.device] = []
    api = SimpleNamespace(set_device=chosen.append)
    for device in (torch.device("cuda", 2), CPU, None):
        take_device(device, api)
    assert chosen == [torch.device("cuda", 2)]

"""Memory of an exact size, in the host and for the device."""

from __future__ import annotations

import pytest
import torch

from penstock.errors import ModelError
from penstock.weights import memory
from penstock.weights.memory import Arena, HostMemory
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
    """What torch.cuda.cudart() is to a machine with CUDA: notes what is registered."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple[str, int]] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.calls.append(("register", num_bytes))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def test_pinning_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(0)
    monkeypatch.setattr(memory, "_driver", lambda: driver)
    host = HostMemory(PAGE_BYTES + 1, is_pinned=True)
    assert host.is_pinned
    host.close()
    host.close()
    assert not host.is_pinned
    assert driver.calls == [("register", 2 * PAGE_BYTES), ("unregister", host.tensor.data_ptr())]


def test_memory_that_cannot_be_pinned_is_used_as_it_is_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(2)
    monkeypatch.setattr(memory, "_driver", lambda: driver)
    with pytest.warns(UserWarning, match=rf"refused to pin {PAGE_BYTES} bytes .*error 2.: .*ulimit -l"):
        host = HostMemory(100, is_pinned=True)
    host.close()
    assert not host.is_pinned
    assert driver.calls == [("register", PAGE_BYTES)]

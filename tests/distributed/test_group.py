"""Exchanges, and how they are counted."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
import torch.distributed as dist

from penstock.config import ParallelConfig
from penstock.distributed.group import _LINES, Group
from penstock.distributed.mesh import build_mesh
from penstock.waits import current_wait
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


def world() -> Group:
    group = build_mesh(ParallelConfig(ulysses_degree=2, ring_degree=2), "cpu")["sequence"]
    group.traffic.clear()
    return group


def numbered(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(8) + rank).view(4, 2).to(dtype)


def exchange(dtype: torch.dtype) -> None:
    group = world()
    mine = numbered(group.rank, dtype)
    for rank, part in enumerate(group.all_gather(mine.t())):
        assert torch.equal(part.float(), numbered(rank, dtype).t().float())
    for is_async in (False, True):
        parts = torch.zeros(16, 2, dtype=dtype)
        own = parts[4 * group.rank : 4 * group.rank + 4].copy_(mine)  # in place, as sharded weights are gathered
        work = group.all_gather_into(parts, own, is_async)
        assert (work is not None) == is_async
        if work is not None:
            work.wait()
        assert torch.equal(parts.float(), torch.cat([numbered(rank, dtype).float() for rank in range(4)]))
    traded = group.all_to_all(mine)
    for rank in range(4):
        assert torch.equal(traded[rank].float(), numbered(rank, dtype)[group.rank].float())
    received, works = group.shift(mine)
    for work in works:
        work.wait()
    assert torch.equal(received.float(), numbered((group.rank - 1) % 4, dtype).float())
    shared = group.broadcast(mine.clone(), 2)
    assert torch.equal(shared.float(), numbered(2, dtype).float())
    assert group.traffic.received_bytes["all_gather"] == 3 * 3 * mine.nbytes
    assert group.traffic.received_bytes["all_to_all"] == 3 * mine.nbytes // 4
    assert group.traffic.received_bytes["shift"] == mine.nbytes
    assert group.traffic.received_bytes["broadcast"] == (0 if group.rank == 2 else mine.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_exchange_of_every_dtype(dtype: torch.dtype) -> None:
    run_ranks(4, exchange, dtype)


def reduce_and_send() -> None:
    group = world()
    total = group.all_reduce(torch.full((3,), float(group.rank)))
    assert total.tolist() == [6.0] * 3
    assert group.traffic.received_bytes["all_reduce"] == 2 * 12 * 3 // 4
    buffer = torch.empty(2)
    if group.rank == 0:
        group.send(torch.tensor([1.0, 2.0]), onto=3).wait()
    if group.rank == 3:
        group.receive(buffer, source=0).wait()
        assert buffer.tolist() == [1.0, 2.0]
        assert group.traffic.received_bytes["receive"] == 8


def test_reduce_and_send() -> None:
    run_ranks(4, reduce_and_send)


def drop_early() -> tuple[list[float], int]:
    """What two ranks gather after the first dropped, at once, what the second began a second later."""
    group = world()
    if group.rank == 1:
        time.sleep(1)
    group.all_gather_into(torch.empty(4 << 20), torch.full((1 << 20,), -1.0), is_async=True)
    gc.collect()
    dist.barrier(group.process_group)
    parts = torch.empty(4 << 20)
    work = group.all_gather_into(parts, torch.full((1 << 20,), float(group.rank)), is_async=True)
    assert work is not None
    work.wait()
    return parts[:: 1 << 20].tolist(), sum(len(line) for line in _LINES[group.process_group].values())


def test_an_exchange_that_its_owner_drops_ends_all_the_same() -> None:
    assert run_ranks(4, drop_early, timeout_s=20) == [([0.0, 1.0, 2.0, 3.0], 0)] * 4


OPERATIONS = {
    "all_gather": lambda group: group.all_gather(torch.ones(2)),
    "all_gather_into": lambda group: group.all_gather_into(torch.empty(4), torch.ones(2)),
    "all_gather_into later": lambda group: group.all_gather_into(torch.empty(4), torch.ones(2), True).wait(),
    "all_to_all": lambda group: group.all_to_all(torch.ones(2, 1)),
    "all_reduce": lambda group: group.all_reduce(torch.ones(2)),
    "broadcast": lambda group: group.broadcast(torch.ones(2), 1),
    "shift": lambda group: [work.wait() for work in group.shift(torch.ones(2))[1]],
    "receive": lambda group: group.receive(torch.ones(2), 1).wait(),
}


def seen_waits() -> dict[str, tuple[int, ...] | None]:
    """What another thread sees of rank 0 while rank 1 is late for each operation."""
    group = build_mesh(ParallelConfig(ulysses_degree=2), "cpu")["ulysses"]
    store = dist.distributed_c10d._get_default_store()
    caller, seen = threading.get_ident(), {}

    def watch(name: str) -> None:
        deadline_s = time.monotonic() + 20
        while current_wait(caller) is None and time.monotonic() < deadline_s:
            time.sleep(0.001)
        wait = current_wait(caller)
        seen[name] = wait.ranks if wait is not None else None
        store.set(f"seen/{name}", "")

    for name, operation in OPERATIONS.items():
        if group.rank == 0:
            thread = threading.Thread(target=watch, args=(name,))
            thread.start()
            operation(group)
            thread.join()
            assert current_wait(caller) is None
        else:
            store.wait([f"seen/{name}"])
            group.send(torch.ones(2), 0).wait() if name == "receive" else operation(group)
    return seen


def test_exchanges_are_noted_while_they_wait() -> None:
    seen, _ = run_ranks(2, seen_waits)
    assert seen == dict.fromkeys(OPERATIONS, (0, 1))


def test_a_group_of_one_exchanges_nothing() -> None:
    group = Group("ring", 0, (0,), None)
    tensor = torch.ones(1, 3)
    assert group.all_gather(tensor)[0] is tensor
    assert group.all_to_all(tensor) is tensor
    assert group.all_reduce(tensor) is tensor
    assert group.broadcast(tensor, 0) is tensor
    assert not group.traffic.num_calls

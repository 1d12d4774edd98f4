"""Ranks that exchange tensors with each other: the only place that calls torch's collectives.

Owns what is sent and how it is counted. Does not know what the tensors mean, or how the ranks came to be.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.waits import noted

_gather_into: Any = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name before torch 2.13


class Work(Protocol):
    """An exchange that is under way."""

    def wait(self) -> Any:
        """Block until it is done."""


class _Works(dist.Work):
    """Several exchanges of some ranks that are one; FSDP2 waits for what is torch's own.

    Kept until it, or one that was begun after it on the same line, is done, though its owner may drop it sooner (a
    model that goes while its first unit is gathered ahead): gloo never ends an exchange whose buffer is gone, nor any
    after.
    """

    def __init__(self, works: Sequence[Any], ranks: tuple[int, ...], line: deque[_Works]) -> None:
        super().__init__()
        self._works = works
        self._ranks = ranks
        self._line = line
        line.append(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for all."""
        with noted(self._ranks):
            is_done = all([work.wait(timeout) for work in self._works])
        with _LINES_LOCK:
            while self in self._line:
                self._line.popleft()
        return is_done


_LINES: WeakKeyDictionary[dist.ProcessGroup, dict[str, deque[_Works]]] = WeakKeyDictionary()
_LINES_LOCK = threading.Lock()


class Traffic:
    """What this rank exchanged: calls and bytes received from others, by operation.

    An all-reduce counts as reduce-scatter and all-gather, 2 (n - 1) / n of its bytes, whatever the library does.
    """

    def __init__(self) -> None:
        self.num_calls: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()

    def add(self, operation: str, num_bytes: int) -> None:
        """Count one call."""
        self.num_calls[operation] += 1
        self.received_bytes[operation] += num_bytes

    def clear(self) -> None:
        """Start again from nothing."""
        self.num_calls.clear()
        self.received_bytes.clear()


@dataclass(frozen=True)
class Group:
    """The ranks along one axis of the mesh, as this rank sees them.

    All of them must call the same methods in the same order, with tensors of the same shape and dtype.

    Attributes:
        name: of the axis.
        rank: of this process within the group.
        ranks: global ranks, in order.
        process_group: torch's; None where the group has one rank, and nothing is exchanged.
        traffic: what was exchanged so far.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; one's own is not copied where the group has one rank."""
        if self.size == 1:
            return [tensor]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in self.ranks]
        with self._noted():
            dist.all_gather([_sendable(part) for part in parts], _sendable(tensor), group=self.process_group)
        self.traffic.add("all_gather", (self.size - 1) * tensor.nbytes)
        return parts

    def all_gather_into(self, parts: Tensor, tensor: Tensor, is_async: bool = False) -> Work | None:
        """Fill `parts` with every rank's tensor, in rank order; nothing is held besides.

        On the CPU each rank sends to each: gloo's own all-gather holds a second `parts`, and takes three times as long.

        Args:
            parts: contiguous, of as many elements as `tensor` times the group's size; `tensor` may be a part of it.
            tensor: contiguous.
            is_async: only begin; both must stay until the wait returns.

        Returns:
            What to wait for; None where it is done (on CUDA: where it is in the order of the current stream).
        """
        if self.size == 1:
            if parts.data_ptr() != tensor.data_ptr():
                parts.copy_(tensor.view_as(parts))
            return None
        work: Work | None
        if parts.device.type == "cpu":
            work = self._trade_into(_sendable(parts).view(self.size, -1), _sendable(tensor).view(-1))
            if not is_async:
                work.wait()
                work = None
        else:
            work = _gather_into(_sendable(parts), _sendable(tensor), group=self.process_group, async_op=is_async)
        self.traffic.add("all_gather", (self.size - 1) * tensor.nbytes)
        return work

    def _trade_into(self, parts: Tensor, own: Tensor) -> Work:
        if parts[self.rank].data_ptr() != own.data_ptr():
            parts[self.rank].copy_(own)
        works: list[Any] = []
        for distance in range(1, self.size):
            onto, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            works.append(dist.isend(own, self.ranks[onto], group=self.process_group))
            works.append(dist.irecv(parts[source], self.ranks[source], group=self.process_group))
        return self._under_way("all_gather", works)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Trade parts: `out[i]` is what rank i had in its `tensor[own rank]`.

        Args:
            tensor: (size, ...).
        """
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        traded = torch.empty_like(tensor)
        with self._noted():
            dist.all_to_all_single(_sendable(traded), _sendable(tensor), group=self.process_group)
        self.traffic.add("all_to_all", tensor.nbytes * (self.size - 1) // self.size)
        return traded

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place where `tensor` is contiguous."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with self._noted():
            dist.all_reduce(tensor, group=self.process_group)
        self.traffic.add("all_reduce", 2 * tensor.nbytes * (self.size - 1) // self.size)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` (contiguous) with that of group rank `source`."""
        if self.size == 1:
            return tensor
        with self._noted():
            dist.broadcast(_sendable(tensor), src=self.ranks[source], group=self.process_group)
        self.traffic.add("broadcast", tensor.nbytes if self.rank != source else 0)
        return tensor

    def shift(self, tensor: Tensor) -> tuple[Tensor, Sequence[Work]]:
        """Begin to send `tensor` to the next rank and to receive the previous one's; wait before either is touched."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        onto, source = self.ranks[(self.rank + 1) % self.size], self.ranks[(self.rank - 1) % self.size]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, _sendable(tensor), onto, self.process_group),
                dist.P2POp(dist.irecv, _sendable(received), source, self.process_group),
            ]
        )
        self.traffic.add("shift", tensor.nbytes)
        return received, [self._under_way("shift", works)]

    def trade(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> None:
        """Send tensors to some ranks and fill others from some, all at once; done when it returns.

        Args:
            sent: contiguous tensors, each with the group rank that it is for.
            received: contiguous tensors, each with the group rank that it comes from.

        Cost: a message per tensor.
        """
        if not sent and not received:
            return
        group, ranks = self.process_group, self.ranks
        operations = [dist.P2POp(dist.isend, _sendable(tensor), ranks[onto], group) for tensor, onto in sent]
        operations += [dist.P2POp(dist.irecv, _sendable(tensor), ranks[source], group) for tensor, source in received]
        self._under_way("trade", dist.batch_isend_irecv(operations)).wait()
        self.traffic.add("trade", sum(tensor.nbytes for tensor, _ in received))

    def send(self, tensor: Tensor, onto: int) -> Work:
        """Begin to send a contiguous tensor to group rank `onto`; it must stay unchanged until the wait returns."""
        work = dist.isend(_sendable(tensor), self.ranks[onto], group=self.process_group)
        self.traffic.add("send", 0)
        assert work is not None  # only of ranks outside the group
        return self._under_way(f"send {onto}", [work])

    def receive(self, tensor: Tensor, source: int) -> Work:
        """Begin to fill a contiguous tensor with the next that group rank `source` sends here."""
        work = dist.irecv(_sendable(tensor), self.ranks[source], group=self.process_group)
        self.traffic.add("receive", tensor.nbytes)
        assert work is not None
        return self._under_way(f"receive {source}", [work])

    def _under_way(self, line: str, works: Sequence[Any]) -> _Works:
        """Those of one line have the same partners, and end in the order in which they began."""
        assert self.process_group is not None
        lines = _LINES.setdefault(self.process_group, {})
        return _Works(works, self.ranks, lines.setdefault(line, deque()))

    def _noted(self) -> AbstractContextManager[None]:
        """A context around what may block until the others come; compiled code has no notes."""
        return nullcontext() if torch.compiler.is_compiling() else noted(self.ranks)


def _sendable(tensor: Tensor) -> Tensor:
    """A view that every library can send: bytes in place of 8-bit floats, numbers in place of bits."""
    if tensor.dtype == torch.bool or (tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1):
        return tensor.view(torch.uint8)
    return tensor

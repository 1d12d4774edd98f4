"""Transfers of sharded weights: each rank brings its part of a unit, then all gather it into its place.

All exchanges are launched by the thread that asks for units, at places of the program that every rank reaches alike,
and so in one order with all that ranks exchange besides. Threads only read. A part in memory is gathered when its unit
is asked for; a part that is read from files when the next unit is, or when the unit is waited for: by then the reads
have had the compute between. Whether they are over never decides.

Owns that order; which unit is due, all ranks decide alike elsewhere. Does not know whether the device is the host.
"""

from __future__ import annotations

import zlib
from collections import deque
from functools import partial
from typing import Any

import torch

from penstock.errors import GenerationError, PenstockError
from penstock.offload.timing import Clock
from penstock.offload.transfer import Device, Ticket, require_alone
from penstock.timeline import Timeline
from penstock.weights.host import StoredSource
from penstock.weights.shards import ShardSource
from penstock.weights.sources import Source

_LANE = "gathering"
_STAMP_BYTES = 8
"""At a unit's begin, where no weight lies: the first rank writes there which unit it gathers."""
_MOST_UNCHECKED = 64


class _Fill:
    """A unit that was asked for.

    Attributes:
        free: since when its place may be written.
        own: the fill of this rank's part; None where the exchange takes it from where it is.
        launched: the exchange, once it was begun.
        stamp: the number of the unit that was gathered, as the host will see it.
        error: why it will not come.
    """

    def __init__(self, name: str, source: ShardSource, begin: int, free: Any, own: Ticket | None) -> None:
        self.name = name
        self.number = zlib.crc32(name.encode())
        self.source = source
        self.begin = begin
        self.free = free
        self.own = own
        self.launched: Any = None
        self.stamp: torch.Tensor | None = None
        self.error: Exception | None = None


class GatherTransfer:
    """Fills units whose bytes several ranks have in parts; all others as the device's own transfer does.

    Args:
        own: moves this rank's parts.
        timeline: where fills are noted, or None.
    """

    def __init__(self, own: Device, timeline: Timeline | None = None) -> None:
        self._own = own
        self._timeline = timeline
        self._pending: deque[_Fill] = deque()  # not launched yet, in the order in which they were asked for
        self._under_way: list[_Fill] = []  # launched, and not waited for
        self._unchecked: deque[_Fill] = deque()  # given to compute, while the host has not seen the stamp
        self._names: dict[int, str] = {}  # by what the first rank stamps units with
        self._failed: Exception | None = None
        self._num_shared = 0
        self._received_bytes = 0
        self._gather_s = 0.0

    @property
    def clock(self) -> Clock:
        """The device's."""
        return self._own.clock

    @property
    def is_seen_by_torch(self) -> bool:
        """As of the device's own transfer."""
        return self._own.is_seen_by_torch

    @property
    def unpinned_bytes(self) -> int:
        """Of the device's own transfer."""
        return self._own.unpinned_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes written to the device: this rank's parts that were brought to it, and what was gathered."""
        return self._own.moved_bytes + self._received_bytes

    @property
    def busy_s(self) -> float:
        """Seconds of gathering, waits for other ranks included; on the CPU until somebody asked whether it is done."""
        self.clock.settle()
        return self._gather_s

    @property
    def lane_s(self) -> float:
        """The same: one exchange follows another."""
        return self.busy_s

    def submit(self, name: str, source: Source, begin: int) -> Ticket:
        """Queue this rank's part, and the gathering behind it.

        Raises:
            GenerationError: where an earlier fill has brought another unit than this rank asked for.
        """
        if not isinstance(source, ShardSource):
            return self._own.submit(name, source, begin)
        self.check_fills()
        while self._pending:
            self._launch()
        self._num_shared += 1
        free, own = self._own.occupy(), None
        if not isinstance(source.own, StoredSource) or source.own.memory.device != self._own.device:
            own = self._own.submit(name, source.own, begin + source.begin)
        fill = _Fill(name, source, begin, free, own)
        self._names[fill.number] = name
        self._pending.append(fill)
        if isinstance(source.own, StoredSource):
            self._launch()
        return Ticket(name, fill, is_shared=True)

    def wait(self, ticket: Ticket) -> None:
        """What compute is given from now on may read the unit.

        Raises:
            GenerationError: where ranks have gathered different units; on CUDA once that is known, which `check_fills`
                waits for.
        """
        if not ticket.is_shared:
            return self._own.wait(ticket)
        fill: _Fill = ticket.work
        self._launch_through(fill)
        if fill.error is not None:
            raise fill.error
        self._own.join(fill.launched)
        self._unchecked.append(fill)
        if len(self._unchecked) > _MOST_UNCHECKED:
            self._own.has_ended(self._unchecked[0].launched, is_waiting=True)
        self.check_fills(is_waiting=False)

    def cancel(self, ticket: Ticket) -> None:
        """Let what was asked for come: the other ranks count on it."""
        if not ticket.is_shared:
            return self._own.cancel(ticket)
        fill: _Fill = ticket.work
        self._launch_through(fill)
        if fill.launched is not None:
            self._own.let_end(fill.launched)

    def is_done(self, ticket: Ticket) -> bool:
        """False for a gathering, until it was waited for: ranks would see it end at different times."""
        return not ticket.is_shared and self._own.is_done(ticket)

    def check_fills(self, is_waiting: bool = False) -> None:
        """Compare what was gathered with what was asked for, as far as the host can see it.

        Args:
            is_waiting: also what is under way, so that nothing that was made of it is given away unchecked.

        Raises:
            GenerationError: where it was another unit.
        """
        while self._unchecked and self._own.has_ended(self._unchecked[0].launched, is_waiting):
            fill = self._unchecked.popleft()
            assert fill.stamp is not None
            found = int(fill.stamp)
            if found != fill.number:
                self._unchecked.clear()
                raise GenerationError(_apart(fill.name, self._names.get(found, "something else")))

    def drain(self) -> None:
        """What Ctrl-C ended half way cannot be taken up again: nobody knows how far the other ranks are.

        Raises:
            GenerationError: where anything was asked for that ranks gather.
        """
        require_alone(self._num_shared)
        self._own.drain()

    def restart(self) -> None:
        """In a child process, which shares no group of ranks: it can read, not gather."""
        self._own.restart()

    def close(self) -> None:
        """Let what was asked for come, which the other ranks count on; then end the device's own transfer."""
        while self._pending:
            self._launch()
        for fill in self._under_way:
            self._own.let_end(fill.launched)
        self._under_way.clear()
        self._own.close()

    def _launch_through(self, fill: _Fill) -> None:
        while self._pending and fill.launched is None and fill.error is None:
            self._launch()

    def _launch(self) -> None:
        """Begin the exchange of the unit that was asked for first.

        Where this rank's part cannot be read, it takes part in no further exchange: the others are a unit ahead. What
        was asked for says so when it is waited for.
        """
        fill = self._pending[0]  # which Ctrl-C leaves there
        source = fill.source
        tell = partial(self._gathered, fill.name, source.num_bytes)
        try:
            if self._failed is not None:
                raise self._failed
            fill.launched = self._own.launch(fill.free, fill.own, partial(self._exchange, fill), tell)
        except (PenstockError, RuntimeError) as error:
            fill.error = self._failed = error
        self._pending.popleft()
        if fill.error is None:
            self._received_bytes += source.num_bytes - (source.part_bytes if fill.own is not None else 0)
            self._under_way = [other for other in self._under_way if not self._own.has_ended(other.launched)]
            self._under_way.append(fill)

    def _exchange(self, fill: _Fill) -> Any:
        source = fill.source
        whole = self._own.place(fill.begin, source.num_bytes)
        part = self._own.place(fill.begin + source.begin, source.part_bytes)
        if fill.own is None and isinstance(source.own, StoredSource):
            part = source.own.memory
        if source.sharers.rank == 0:
            _stamp(part).fill_(fill.number)
        work = source.sharers.all_gather_into(whole, part, is_async=self._own.device.type == "cpu")
        fill.stamp = self._own.seen(fill.name, _stamp(self._own.place(fill.begin, _STAMP_BYTES)))
        return work

    def _gathered(self, name: str, num_bytes: int, begin_s: float, end_s: float) -> None:
        self._gather_s += end_s - begin_s
        if self._timeline is not None:
            self._timeline.add("fill", name, begin_s, end_s, lane=_LANE, num_bytes=num_bytes)


def _stamp(memory: torch.Tensor) -> torch.Tensor:
    """The number in the first bytes of a unit."""
    return memory[:_STAMP_BYTES].view(torch.int64)


def _apart(name: str, other: str) -> str:
    return (
        f"this rank gathers {name}, and the first of those it shares with {other}: their calls run different blocks, "
        "and the weights would be mixed up. Shard over ranks whose calls are alike: with --cfg-parallel-size C, give "
        "--hsdp-replicate-size C. Where another pipeline over these ranks has failed, call remove() on that one first."
    )

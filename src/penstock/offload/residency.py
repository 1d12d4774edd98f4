"""Which units are on the device: the one owner of that state.

    COLD -> FILLING -> READY -> IN_USE -> READY ... -> COLD

Every unit has one place in the arena for ever; places may overlap. Filling a unit ends the stay of those that
overlap it, and a unit in use is never ended. On the device a unit's weights are views of its place; elsewhere they
are stand-ins that fetch it. Nothing is copied back: weights do not change.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from penstock.errors import GenerationError, PenstockError, UsageError
from penstock.offload.calls import is_in_call, is_running
from penstock.offload.gradients import is_in_backward, refuse_backward
from penstock.offload.likeness import hand_over
from penstock.offload.tenants import Placements, State, Tenant
from penstock.offload.timing import Stays
from penstock.offload.transfer import Ticket, Transfer
from penstock.offload.units import Weight
from penstock.timeline import Timeline
from penstock.weights.memory import Arena
from penstock.weights.proof import Proof

_WRITTEN = (
    "a weight that penstock streams was changed in place while it was on the device; the change is lost when its unit "
    "comes again. Call remove() on what penstock.apply returned, change the weights, and apply again."
)
_LIVING: weakref.WeakSet[Residency] = weakref.WeakSet()  # those to be told of a fork


class Residency:
    """The states of all units of a pipeline.

    Args:
        tenants: all units with their places.
        arena: the device's memory.
        transfer: fills it.
        proof: checks every fill and poisons what is given up, or None.
        timeline: where waits and stays are noted, or None.

    Attributes:
        clock: measures what the device does.
        num_fills: fills so far.
        num_demanded: of these, fills that nobody had asked for ahead of use.
        last_filled: the last of these, the oldest first; as many as can be under way.
        peak_bytes: the most bytes that units took at once.
        placements: where their weights are, from `install` on.
    """

    def __init__(
        self,
        tenants: Sequence[Tenant],
        arena: Arena,
        transfer: Transfer,
        proof: Proof | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.tenants = list(tenants)
        self.arena = arena
        self._transfer = transfer
        self._proof = proof
        self.clock = transfer.clock
        self._stays = Stays(self.clock, timeline)
        self._lock = threading.RLock()
        self.num_fills = 0
        self.num_demanded = 0
        self.last_filled: deque[Tenant] = deque(maxlen=len(self.tenants))
        self.peak_bytes = 0
        self._held_bytes = 0
        self._is_torn = False  # whether an operation was left half way, as Ctrl-C leaves one
        self._is_stale = False  # whether somebody has changed what is there
        self._owner = threading.get_ident()
        self._depth = 0  # components that run, one inside the other
        self._casts: dict[int, torch.Tensor] = {}
        self.placements = Placements(())
        for tenant in self.tenants:
            tenant.rivals = tuple(
                other for other in self.tenants if other is not tenant and other.plan.overlaps(tenant.plan)
            )
            tenant.make_live(arena)
        self._version = arena.tensor._version
        _LIVING.add(self)

    @property
    def exposed_wait_s(self) -> float:
        """Seconds that compute stood still for weights; waits for the device, where that has a clock of its own."""
        return self._stays.waited_s

    def begin_run(self) -> None:
        """A component begins to run on this thread.

        Raises:
            GenerationError: while one runs on another thread.
        """
        with self._lock:
            self._claim()
            self._depth += 1

    def end_run(self) -> None:
        """A component has run; one that was refused on another thread has not."""
        if threading.get_ident() == self._owner:
            self._depth = max(self._depth - 1, 0)

    def _claim(self) -> None:
        """The weights are this thread's, until another one takes them between two runs.

        A run that Ctrl-C ended is not told to be over; its thread is then in no module's call any more.
        """
        here = threading.get_ident()
        if here == self._owner:
            return
        with self._lock:
            if self._depth and is_in_call(self._owner):
                raise GenerationError(
                    "this pipeline, or another one with the same modules, runs on another thread already. A placed "
                    "pipeline runs on one thread at a time: wait for it, or place one of its own for each thread."
                )
            self._owner, self._depth = here, 0

    def forget_threads(self) -> None:
        """In a child process, which inherits no threads: fills in progress will never end, and locks may be held."""
        self._lock = threading.RLock()
        self._transfer.restart()
        self._is_torn = True

    def install(self) -> None:
        """Put stand-ins in the place of all weights; nothing is moved yet."""
        device = self.arena.tensor.device
        for tenant in self.tenants:  # all of them first: making one may fail
            tenant.make_cold(device, self.fetch)
        self.placements = Placements(self.tenants)
        for tenant in self.tenants:
            for weight, cold in zip(tenant.unit.weights, tenant.cold, strict=True):
                weight.table[weight.key] = cold

    def remove(self) -> None:
        """Put the weights back as they were found; fills in progress are given up."""
        with self._lock:
            for tenant in self.tenants:
                if tenant.ticket is not None:
                    self._transfer.cancel(tenant.ticket)
                    tenant.ticket = None
                for weight, cold, live in zip(tenant.unit.weights, tenant.cold, tenant.live, strict=False):
                    restored = self.restored(weight)
                    hand_over(live, restored)
                    cold.release(restored)  # for those who hold on to it
                    current = weight.table.get(weight.key)
                    if current is cold or current is live:
                        weight.table[weight.key] = restored
                tenant.state = State.COLD
        if self._was_written():
            warnings.warn(_WRITTEN, UserWarning, stacklevel=2)

    def restored(self, weight: Weight) -> torch.Tensor:
        """What is left in the place of a weight in the end, once it was removed."""
        return weight.restored(self._casts)

    def enter(self, tenant: Tenant, is_demanded: bool = False) -> bool:
        """Begin to fill a unit where that disturbs nobody; what compute needs at once disturbs more.

        Returns:
            Whether the unit is on the device or on its way.

        Raises:
            GenerationError: for a demanded unit whose place a running block holds.
            WeightsError: for files that changed.
        """
        if tenant.state is not State.COLD and not (self._is_torn or self._is_stale):
            return True
        if is_in_backward() and not is_demanded:
            return False
        with self._operation():
            has_room = self._has_room(tenant, is_demanded)
            if has_room:
                self._fill(tenant, is_demanded)
            return has_room

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """One change of state. What Ctrl-C ended half way is undone before the next: all units cold, nothing fills."""
        with self._lock:
            self._claim()
            self.require_unwritten()
            is_torn, self._is_torn = self._is_torn, True
            try:
                if is_torn:
                    self._reset()
                    is_torn = False
                elif self._is_stale:
                    self._forget()
                yield
            except PenstockError:  # told to the caller, with all states as they should be
                self._is_torn = is_torn  # what could not be undone is not
                raise
            finally:
                self._version = self.arena.tensor._version
            self._is_torn = False

    def _reset(self) -> None:
        """Give everything up, fills included whose tickets were lost."""
        self._transfer.drain()
        for tenant in self.tenants:
            tenant.ticket = None
        self._forget()
        for tenant in self.tenants:
            tenant.bind(is_live=False)
        self._held_bytes = 0

    def _forget(self) -> None:
        """Give everything up; all of it comes anew."""
        for tenant in self.tenants:
            self._give_up(tenant)
        self._is_stale = False

    def require_unwritten(self) -> None:
        """Refuse to go on with weights that somebody changed in place; the next operation brings all of them anew.

        Raises:
            UsageError: saying what to do.
        """
        if self._was_written():
            self._version = self.arena.tensor._version
            self._is_stale = True
            raise UsageError(_WRITTEN)

    def settle(self) -> bool:
        """Put the weights where the modules look, and have those come anew that somebody changed in place.

        Returns:
            Whether somebody did.
        """
        with self._lock:
            was_written = self._was_written()
            self._is_stale = self._is_stale or was_written
            self._version = self.arena.tensor._version
            for tenant in self.tenants:
                tenant.bind(is_live=tenant.state in (State.READY, State.IN_USE))
            return was_written

    def _was_written(self) -> bool:
        """Whether somebody changed a weight in place; torch counts writes to a storage. Not told on accelerators."""
        return not self._transfer.is_seen_by_torch and self.arena.tensor._version != self._version

    def _has_room(self, tenant: Tenant, is_demanded: bool) -> bool:
        """Whether a unit may be filled now: not where others use its place, or are on their way to it."""
        if tenant.state is not State.COLD:
            return True
        for rival in tenant.rivals:
            if rival.state is State.IN_USE:
                if is_demanded and is_running(rival.unit.module):
                    raise GenerationError(
                        f"{tenant.name} runs inside {rival.name}, and both have the same place on the device. "
                        "Give a larger max_weight_memory, or --offload sequential."
                    )
                if not is_demanded:
                    return False
            if rival.ticket is not None and not is_demanded and not self._transfer.is_done(rival.ticket):
                return False
        return True

    def _fill(self, tenant: Tenant, is_demanded: bool) -> None:
        if tenant.state is not State.COLD:
            return
        if is_in_backward():
            refuse_backward(tenant.name)
        for rival in tenant.rivals:
            self._give_up(rival)
        tenant.source.check()
        first = self.arena.tensor[tenant.plan.begin : tenant.plan.begin + 1]
        first.zero_()  # no weight's byte: it tells autograd that what it may have kept of this place has gone
        begun = self._stays.mark()
        tenant.ticket = self._submit(tenant)
        if tenant.ticket.is_shared:  # the host may have waited for the reads of the unit before
            self._stays.waited(tenant.name, begun, self._stays.mark())
        tenant.state = State.FILLING
        self.num_demanded += is_demanded
        self._held_bytes += tenant.plan.num_bytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        self._stays.entered(tenant.name, tenant.plan.num_bytes, begun)

    def _submit(self, tenant: Tenant) -> Ticket:
        ticket = self._transfer.submit(tenant.name, tenant.source, tenant.plan.begin)
        self.num_fills += 1
        self.last_filled.append(tenant)
        return ticket

    def catch_up(self, tenants: Sequence[Tenant]) -> None:
        """Fill what only others have asked for, whose fills take this rank; then give everything up, as they do."""
        with self._lock:
            self._claim()
            was_written = self._was_written()
            for tenant in tenants:
                self._transfer.cancel(self._submit(tenant))
            self._forget()
            if not was_written:
                self._version = self.arena.tensor._version

    def ready(self, tenant: Tenant) -> None:
        """Make a unit's weights usable; returns once compute may be given them.

        Raises:
            GenerationError: where it cannot be on the device now.
            WeightsError: for what the readers met; the unit is then as if it had not been asked for.
        """
        if tenant.state in (State.READY, State.IN_USE) and not (self._is_torn or self._is_stale):
            return
        with self._operation():
            if self._has_room(tenant, is_demanded=True):
                self._fill(tenant, is_demanded=True)
            if tenant.ticket is not None:
                self._receive(tenant, tenant.ticket)

    def _receive(self, tenant: Tenant, ticket: Ticket) -> None:
        """Wait for a fill, check it, and put the weights where the modules look."""
        begun = self._stays.mark()
        is_there = False
        try:
            self._transfer.wait(ticket)
            self._stays.waited(tenant.name, begun, self._stays.mark())
            if self._proof is not None:
                self._proof.verify(tenant.name, tenant.unit.pieces, tenant.layout, tenant.plan.begin)
            is_there = True
        finally:
            if not is_there:
                self._give_up(tenant)
        tenant.bind(is_live=True)
        tenant.state = State.READY
        tenant.ticket = None

    def use(self, tenant: Tenant) -> None:
        """Make a unit's weights usable, and keep them until `release`."""
        self.ready(tenant)
        tenant.state = State.IN_USE

    def release(self, tenant: Tenant) -> None:
        """The unit's forward is over; its weights stay until their place is needed."""
        if tenant.state is State.IN_USE:
            tenant.state = State.READY

    def fetch(self, tenant: Tenant, number: int) -> torch.Tensor:
        """The weight behind a stand-in."""
        self._claim()
        self.ready(tenant)
        return tenant.live[number]

    def _give_up(self, tenant: Tenant) -> None:
        """End a unit's stay, and with it a fill in progress."""
        if tenant.state is State.COLD:
            return
        if tenant.ticket is not None:
            self._transfer.cancel(tenant.ticket)
            tenant.ticket = None
        tenant.bind(is_live=False)
        tenant.num_left += 1
        tenant.state = State.COLD
        self._held_bytes -= tenant.plan.num_bytes
        if self._proof is not None:
            self.arena.poison(tenant.plan.begin, tenant.plan.num_bytes)
        self._stays.left(tenant.name)


def _after_fork() -> None:
    for residency in list(_LIVING):
        residency.forget_threads()


os.register_at_fork(after_in_child=_after_fork)

"""A component while it runs: its units come in order, its streamed blocks ahead of use.

Owns the hooks on one component and its blocks, and what is prefetched when. Does not know bytes or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from penstock.offload.changes import require_one_place, require_untouched
from penstock.offload.clock import StepClock
from penstock.offload.compiled import compile_inside
from penstock.offload.convoy import Convoy
from penstock.offload.gradients import watch_backward
from penstock.offload.residency import Residency
from penstock.offload.schedule import Schedule
from penstock.offload.tenants import State, Tenant
from penstock.timeline import Timeline
from penstock.undo import Undo
from penstock.weights.shards import written_bytes


class Stage:
    """Hooks on one component.

    Args:
        module: the component.
        tenants: its units, in their supposed order, and the one that it shares with other components.
        residency: moves them.
        prefetch: streamed blocks on their way beside the one that runs.
        clock: says when the last call of a denoiser is; None for a component that runs once.
        timeline: where compute is noted, or None.
        convoy: lets calls pass through a streamed block together.

    Attributes:
        num_computed: stays of streamed blocks in which they ran, so far.
        saved_bytes: not moved, because several calls ran a block while it was there.
    """

    def __init__(
        self,
        module: nn.Module,
        tenants: Sequence[Tenant],
        residency: Residency,
        prefetch: int,
        clock: StepClock | None = None,
        timeline: Timeline | None = None,
        convoy: Convoy | None = None,
    ) -> None:
        self._module = module
        self._tenants = list(tenants)
        self._residency = residency
        self._ahead = prefetch + 1
        self._clock = clock
        self._timeline = timeline
        self._convoy = convoy or Convoy()
        self.schedule = self._supposed()
        self._undo = Undo()
        self._device_clock = residency.clock
        self._begun = self._device_clock.mark()
        self.num_computed = 0
        self._compute_s = 0.0
        self.saved_bytes = 0

    @property
    def compute_s(self) -> float:
        """Seconds that streamed blocks computed, so far, on the device's clock."""
        self._device_clock.settle()
        return self._compute_s

    @property
    def block_bytes(self) -> float:
        """Bytes of a streamed block, on average."""
        streamed = [tenant for tenant in self._tenants if tenant.plan.slot is not None]
        return sum(tenant.plan.num_bytes for tenant in streamed) / max(len(streamed), 1)

    def _supposed(self) -> Schedule[Tenant]:
        return Schedule([tenant for tenant in self._tenants if tenant.plan.slot is not None])

    def forget(self) -> None:
        """Forget what runs have taught: the order of the blocks, how many calls a step has."""
        self.schedule = self._supposed()
        if self._clock is not None:
            self._clock.restart()

    def announce(self) -> None:
        """A call was put off, to be made by the convoy: it is one of the step that runs now."""
        if self._clock is not None:
            self._clock.tick()

    def install(self) -> None:
        """Set the hooks."""
        for module in entries(self._module):
            self._hook(module, self._begin, self._end)
        for tenant in self._tenants:
            if not tenant.unit.is_block:
                continue
            if tenant.plan.slot is not None:
                self._hook(tenant.unit.module, partial(self._enter, tenant), partial(self._leave, tenant))
            else:
                self._hook(tenant.unit.module, partial(self._meet, tenant), partial(self._part, tenant))
            self._undo.add(compile_inside(tenant.unit.module))

    def remove(self) -> None:
        """Take the hooks away."""
        self._undo.run()

    def _hook(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        outside: Any = torch.compiler.disable
        self._undo.add(module.register_forward_pre_hook(outside(before), prepend=True).remove)
        self._undo.add(module.register_forward_hook(outside(after), always_call=True).remove)

    def _begin(self, *_: Any) -> None:
        """The component runs: ask for its units in the order in which they will be needed."""
        self._residency.begin_run()
        self._residency.require_unwritten()
        if self._convoy.begin(self):
            self.schedule.begin()
        if self._clock is not None and not self._convoy.is_going:
            self._clock.tick()
        require_untouched(self._tenants)
        if self._clock is None or self._clock.is_first:
            require_one_place(self._residency.placements, self._module, self._residency.arena.tensor)
        due: list[Tenant] = []
        for tenant in self.schedule.upcoming(self._ahead, wraps=False):
            if not any(nearer in tenant.rivals for nearer in due):
                due.append(tenant)
        for tenant in self._tenants:
            if tenant.state is State.COLD and (tenant.plan.slot is None or tenant in due):
                self._residency.enter(tenant)
        for tenant in self._tenants:
            if not tenant.unit.is_block:
                self._residency.ready(tenant)  # what lies outside of blocks is needed first
        self._begun = self._device_clock.mark()

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._residency.end_run()
        watch_backward([tenant for tenant in self._tenants if not tenant.unit.is_block], args, output)
        if self._convoy.end(self):
            self.schedule.end()
        if self._timeline is not None and not any(tenant.unit.is_block for tenant in self._tenants):
            self._note(self._tenants[0])
        return _apart(output, self._residency.arena.tensor)

    def _enter(self, tenant: Tenant, *_: Any) -> None:
        """A streamed block runs: its weights are waited for, and those behind it asked for."""
        if self._convoy.arrive(tenant, self.schedule.place_of(tenant)):
            self.schedule.advance(tenant)
        elif any(other is not tenant and other.plan.slot == tenant.plan.slot for other in self.schedule.order):
            self.saved_bytes += written_bytes(tenant.source)  # it would have been driven out
        self._residency.use(tenant)
        self._ask(self._ahead - 1)
        self._begun = self._device_clock.mark()

    def _leave(self, tenant: Tenant, _: nn.Module, args: Any, output: Any) -> None:
        """A streamed block has run: its slot is the next one's, unless other calls have come to the same block."""
        watch_backward([tenant], args, output)
        self._note(tenant)
        if not self._convoy.leave(tenant):
            return
        self.num_computed += 1
        self._residency.release(tenant)
        self._ask(self._ahead)

    def _meet(self, tenant: Tenant, *_: Any) -> None:
        """A resident block runs; it only has to be waited for where others had its place meanwhile."""
        if tenant.state is not State.READY:
            self._residency.ready(tenant)
        if self._timeline is not None:
            self._begun = self._device_clock.mark()

    def _part(self, tenant: Tenant, _: nn.Module, args: Any, output: Any) -> None:
        watch_backward([tenant], args, output)
        if self._timeline is not None:
            self._note(tenant)

    def _ask(self, count: int) -> None:
        """Ask for the next blocks, the nearest first; none that would drive out a nearer one."""
        wraps = self._clock is not None and not self._clock.is_last()
        nearer: list[Tenant] = []
        for tenant in self.schedule.upcoming(count, wraps):
            if any(other in tenant.rivals for other in nearer) or not self._residency.enter(tenant):
                return
            nearer.append(tenant)

    def _note(self, tenant: Tenant) -> None:
        """The device has computed, or will, what was launched since `_begun`."""

        def tell(begin_s: float, end_s: float) -> None:
            if tenant.plan.slot is not None:
                self._compute_s += end_s - begin_s
            if self._timeline is not None:
                self._timeline.add("compute", tenant.name, begin_s, end_s)

        self._device_clock.between(self._begun, self._device_clock.mark(), tell)


def entries(module: nn.Module) -> list[nn.Module]:
    """Where a component is entered: its forward, and the halves of a VAE, whose methods do not go through it."""
    halves = [getattr(module, name, None) for name in ("encoder", "decoder")] if hasattr(module, "decode") else []
    return [module, *(half for half in halves if isinstance(half, nn.Module))]


def _apart(output: Any, arena: torch.Tensor) -> Any:
    """A component's output without views of its weights, which the next unit would overwrite; None without any.

    Cost: a copy of what is such a view; else a look at each tensor.
    """
    place = arena.untyped_storage().data_ptr()
    if not any(_storage(leaf) == place for leaf in tree_leaves(output)):
        return None
    return tree_map(lambda leaf: leaf.clone() if _storage(leaf) == place else leaf, output)


def _storage(value: Any) -> int | None:
    """The address of a tensor's storage."""
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return value.untyped_storage().data_ptr() if is_plain else None

"""In which order units run, and so which of them is gathered while another computes.

At first the order of definition is supposed; the first forward that ends shows the order that holds. Owns which unit
asks for which, and what becomes of a forward that did not end. Does not know how a gather is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from penstock.errors import GenerationError

_FORGET_AFTER = 1000  # forwards: FSDP2 keeps a record of every one, for a backward that does not come


class Order:
    """The order of the units of one root."""

    def __init__(self, root: nn.Module, units: Sequence[nn.Module], depth: int, repeats: bool) -> None:
        """Suppose the order of definition.

        Args:
            root: a sharded model.
            units: its sharded units.
            depth: how many units are gathered ahead of the one that computes.
            repeats: whether forwards follow each other: then the last units ask for the first of the next forward.
        """
        self.root = root
        self.depth = depth
        self.repeats = repeats
        self.supposed = list(units)
        self.seen: dict[int, nn.Module] = {}
        self.is_running = False
        self.num_calls = 0
        self._ask(self.supposed)
        self._recorders: list[Any] = [unit.register_forward_pre_hook(self._record) for unit in units]
        root.register_forward_pre_hook(self._begin, prepend=True)  # before FSDP's
        root.register_forward_hook(self._end)

    def _ask(self, order: Sequence[nn.Module]) -> None:
        for place, unit in enumerate(order):
            following = [*order[place + 1 :], *(order[:place] if self.repeats else ())]
            _as_sharded(unit).set_modules_to_forward_prefetch([_as_sharded(one) for one in following[: self.depth]])
        _as_sharded(self.root).set_modules_to_forward_prefetch([_as_sharded(unit) for unit in order[: self.depth]])

    def _record(self, unit: nn.Module, args: Any) -> None:
        self.seen[id(unit)] = unit

    def _begin(self, root: nn.Module, args: Any) -> None:
        self.num_calls += 1
        if self.is_running or self.num_calls % _FORGET_AFTER == 0:
            self._start_anew()
        self.is_running = True
        if self._recorders:
            self.seen.clear()
        if self.num_calls == 1 and torch.is_inference_mode_enabled():
            self._make_room()

    def _make_room(self) -> None:
        """Gather every unit once: room that FSDP2 makes in inference mode could never be filled outside of it."""
        with torch.inference_mode(False), torch.no_grad():
            for module in (self.root, *self.supposed):
                _as_sharded(module).unshard()
                _as_sharded(module).reshard()

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        self.is_running = False
        if self._recorders:
            found = list(self.seen.values())
            if found != self.supposed:
                self._forget(self.supposed)
                self._ask(found)
            for recorder in self._recorders:
                recorder.remove()
            self._recorders.clear()

    def _forget(self, units: Iterable[nn.Module]) -> None:
        for unit in units:
            _as_sharded(unit).set_modules_to_forward_prefetch([])

    def _start_anew(self) -> None:
        """Forget the forward before, which may have been interrupted, and what it has gathered."""
        reset = getattr(self.root, "reset_iter_state", None)
        if reset is not None:
            reset()
        elif self.is_running:
            raise GenerationError(
                f"the forward before this one, number {self.num_calls - 1} of {type(self.root).__name__}, did not end, "
                "and this version of torch cannot clear up behind it. Load the model again, or use torch 2.13."
            )


def _as_sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module

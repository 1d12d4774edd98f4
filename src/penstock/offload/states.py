"""`state_dict()` of a placed component gives the weights themselves, not stand-ins or places that are filled anew.

Saving a placed pipeline therefore works, and reads from where the weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penstock.errors import UsageError
from penstock.offload.units import ComponentUnits, Partition, Weight


def whole_states(partition: Partition, weight_of: Callable[[Any], Weight | None]) -> Callable[[], None]:
    """Hook the `state_dict` of all components.

    Args:
        partition: their weights.
        weight_of: the weight that a tensor stands for, None for somebody else's.

    Returns:
        A function that takes the hooks away.
    """
    handles = []
    for part in partition.components:
        weights = [weight for unit in _units_of(part, partition) for weight in unit.weights]
        shown: list[tuple[Weight, Any]] = []
        module: Any = part.module
        handles.append(module.register_state_dict_pre_hook(_Show(weights, shown, weight_of)))
        handles.append(module.register_state_dict_post_hook(_Hide(shown)))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _units_of(part: ComponentUnits, partition: Partition) -> list[Any]:
    return [*part.units, *([partition.shared] if partition.shared else [])]


class _Show:
    """Before: put the stored weights where `state_dict` looks, in the dtype they have on the device."""

    def __init__(
        self, weights: list[Weight], shown: list[tuple[Weight, Any]], weight_of: Callable[[Any], Weight | None]
    ) -> None:
        self._weights = weights
        self._shown = shown
        self._weight_of = weight_of

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        gone = next((weight for weight in self._weights if not weight.original.numel()), None)
        if gone is not None:  # those without elements are in no unit
            raise UsageError(
                f"{gone.name} is sharded over ranks, and no rank has all of it: call remove() on what penstock.apply "
                "returned, on all ranks, before its state is taken."
            )
        casts: dict[int, torch.Tensor] = {}  # tied weights stay tied
        for weight in self._weights:
            current = weight.table.get(weight.key)
            if self._weight_of(current) is None:  # somebody else has put it there, and it is there
                continue
            self._shown.append((weight, current))
            weight.table[weight.key] = weight.restored(casts)


class _Hide:
    """After: put back what was there."""

    def __init__(self, shown: list[tuple[Weight, Any]]) -> None:
        self._shown = shown

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
        while self._shown:
            weight, current = self._shown.pop()
            weight.table[weight.key] = current

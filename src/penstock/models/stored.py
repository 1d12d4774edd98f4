"""A module on the meta device, seen as its checkpoint stores it: the dtypes of the files, and each tensor's record.

What a plan needs to know before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from penstock.models.ledger import DTYPE_NAMES, tensors_of
from penstock.weights.index import TensorRecord, WeightIndex

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def as_stored(module: nn.Module, index: WeightIndex | None) -> dict[int, TensorRecord]:
    """Give a module's tensors the dtypes that they have in its files; tied ones stay tied.

    Args:
        module: on the meta device; changed in place.
        index: of its files, or None where it has none that can be mapped.

    Returns:
        By the id of a tensor of the module, its record. A tensor that has another name in the files has none.
    """
    if index is None:
        return {}
    records = {
        id(tensor): index.tensors[name]
        for name, tensor in tensors_of(module).items()
        if name in index.tensors and index.tensors[name].dtype in _DTYPES
    }
    made: dict[int, torch.Tensor] = {}
    for table, key, tensor in list(_entries(module)):
        record = records.get(id(tensor))
        if record is None:
            continue
        if id(tensor) not in made:
            stored = torch.empty(tensor.shape, dtype=_DTYPES[record.dtype], device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(stored, requires_grad=False) if is_parameter else stored
        table[key] = made[id(tensor)]
    return {id(made[old]): record for old, record in records.items()}


def _entries(module: nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    for inner in module.modules():
        tables: list[dict[str, torch.Tensor | None]] = [inner._parameters, inner._buffers]  # type: ignore[list-item]
        for table in tables:
            yield from ((table, key, tensor) for key, tensor in table.items() if tensor is not None)

"""How many bytes each tensor of a pipeline has: in its files, or in memory.

Owns the match between the names in a checkpoint and the tensors of a module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from penstock.weights.index import ITEM_BYTES, WeightIndex

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""The name of a dtype in a safetensors header."""


class Ledger:
    """Bytes and dtype of every parameter and persistent buffer; each tensor is counted once.

    Tensors are known by identity, so that tied weights and modules shared between components count once.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, str]] = {}
        self._keep: list[torch.Tensor] = []  # an id is only valid while its tensor lives

    def add(self, module: nn.Module, index: WeightIndex | None) -> None:
        """Enter a module's tensors: as its files hold them, or as they are in memory without an index."""
        usual = next(iter(index.dtype_bytes), None) if index else None
        for name, tensor in tensors_of(module).items():
            record = index.tensors.get(name) if index else None
            if record is not None:
                entry = (record.num_bytes, record.dtype)
            elif usual in ITEM_BYTES:  # renamed between file and module: same size, the usual dtype
                entry = (tensor.numel() * ITEM_BYTES[usual], usual)
            else:
                entry = (
                    tensor.numel() * tensor.element_size(),
                    DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)),
                )
            if id(tensor) not in self._entries:
                self._entries[id(tensor)] = entry
                self._keep.append(tensor)

    def num_bytes(self, module: nn.Module, without: Sequence[nn.Module] = ()) -> int:
        """Bytes of a module's tensors, tied ones once, less those of the modules named in `without`."""
        return sum(self.dtype_bytes(module, without).values())

    def dtype_bytes(self, module: nn.Module, without: Sequence[nn.Module] = ()) -> dict[str, int]:
        """The same by dtype, largest first."""
        counter: Counter[str] = Counter()
        for identity in _identities(module).difference(*map(_identities, without)):
            num_bytes, dtype = self._entries[identity]
            counter[dtype] += num_bytes
        return dict(counter.most_common())


def _identities(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in tensors_of(module).values()}


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers by name; tied ones under each of their names."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}

"""Tensors that are views of their checkpoint files, made without touching a byte of them.

safetensors' own `load_file` maps as well, but touches every tensor, and each touch makes the system read ahead: with a
read-ahead of 8 MiB a third of a checkpoint is read before anything runs.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from safetensors.torch import load_file

from penstock.models.ledger import DTYPE_NAMES
from penstock.weights.index import TensorRecord, WeightIndex

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def map_tensors(index: WeightIndex) -> dict[str, torch.Tensor]:
    """All tensors of an index, by their names in the files.

    Each has a storage of its own, and writing to it changes a private copy of its page and not the file.

    Cost: one mapping per file; nothing is read. A file with a dtype that torch spells in another way is left to
    safetensors.
    """
    records: dict[Path, list[TensorRecord]] = {}
    for record in index:
        records.setdefault(record.file, []).append(record)
    tensors: dict[str, torch.Tensor] = {}
    for file, members in records.items():
        if all(record.dtype in _DTYPES for record in members):
            tensors.update(_views(file, members))
        else:
            tensors.update(load_file(file))
    return tensors


def _views(file: Path, records: list[TensorRecord]) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return {record.name: _view(memory, record) for record in records}


def _view(memory: mmap.mmap, record: TensorRecord) -> torch.Tensor:
    dtype = _DTYPES[record.dtype]
    if record.num_bytes == 0:
        return torch.empty(record.shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=record.num_bytes, offset=record.offset)
    return flat.view(dtype).view(record.shape)

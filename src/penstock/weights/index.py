"""Where each tensor of a component lies: the headers of its safetensors files, read and checked.

Owns the file format and the naming of weight files and shards. Reads headers only, a few KiB for a file of
gigabytes; does not know torch, modules or devices.

    file: | 8 bytes: header length | header: JSON, name -> dtype, shape, [begin, end) | tensor bytes ... |

Source: the format's own description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import WeightsError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the dtype's name in a safetensors header."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and as transformers save
REDO = "Download or save the model again."
"""What helps where files are not as they were saved."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One tensor in a file: `num_bytes` bytes from `offset`, counted from the start of the file."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightIndex:
    """All tensors of one component, by their name in the checkpoint."""

    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.num_bytes for record in self.tensors.values())

    @property
    def dtype_bytes(self) -> dict[str, int]:
        """Bytes by dtype name, largest first."""
        counter: Counter[str] = Counter()
        for record in self.tensors.values():
            counter[record.dtype] += record.num_bytes
        return dict(counter.most_common())

    def __iter__(self) -> Iterator[TensorRecord]:
        return iter(self.tensors.values())


def read_index(folder: Path, variant: str | None = None) -> WeightIndex | None:
    """Read and check the headers of a component's safetensors files.

    Args:
        folder: the component's folder, such as `model/transformer`.
        variant: weight variant, such as `fp16`; a component without that variant falls back to the plain
            files, as diffusers does.

    Returns:
        The index, or None for a component that has no safetensors files (a tokenizer, or pickled weights).

    Raises:
        WeightsError: for a missing shard, a truncated file, or a header that is not what it should be.

    Cost: one read of the header and one `stat` per file.
    """
    for name in (variant, None) if variant else (None,):
        files = _weight_files(folder, name)
        if files:
            tensors = {record.name: record for file in files for record in read_header(file)}
            return WeightIndex(tensors)
    return None


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    infix = f".{variant}" if variant else ""
    for stem in _STEMS:
        shards = folder / f"{stem}.safetensors.index{infix}.json"
        if shards.is_file():
            return _shard_files(shards)
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return [single]
    return []


def _shard_files(shards: Path) -> list[Path]:
    try:
        weight_map = json.loads(shards.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{shards}: not a shard index ({error!r}). {REDO}") from error
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{shards}: shard {name!r} is not a plain file name. {REDO}")
        if not (shards.parent / name).is_file():
            raise WeightsError(
                f"{shards.parent / name}: missing; {shards.name} names {len(names)} shards and this is one. {REDO}"
            )
    return [shards.parent / name for name in names]


def read_header(file: Path) -> list[TensorRecord]:
    """Read one file's header and check it against the size of the file.

    Raises:
        WeightsError: for a file that is cut short, too long, or has no valid header.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise WeightsError(
                f"{file}: corrupt or truncated; its header should have {length} bytes, the file has {size}. {REDO}"
            )
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        records = [_record(file, _LENGTH_BYTES + length, name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file}: corrupt header ({error!r}). {REDO}") from error
    end = max((record.offset + record.num_bytes for record in records), default=_LENGTH_BYTES + length)
    if end != size:
        raise WeightsError(f"{file}: {size} bytes, but its header describes {end}. {REDO}")
    return records


def _record(file: Path, base: int, name: str, entry: dict[str, Any]) -> TensorRecord:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    expected = math.prod(shape) * ITEM_BYTES[entry["dtype"]] if entry["dtype"] in ITEM_BYTES else end - begin
    if not 0 <= begin <= end or end - begin != expected:
        raise ValueError(f"{name}: bytes {begin} to {end} do not hold {shape} of {entry['dtype']}")
    return TensorRecord(
        name=name, file=file, offset=base + begin, num_bytes=end - begin, dtype=entry["dtype"], shape=shape
    )

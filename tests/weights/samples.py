"""Weights to move: files and memory full of known bytes, pieces of both, and what they must become."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import torch

from penstock.weights.ranges import CACHE_LINE_BYTES, Cast, FileRange, HostRange, Piece, memory_of

BF16_TO_F32 = Cast(torch.bfloat16, torch.float32)
F32_TO_BF16 = Cast(torch.float32, torch.bfloat16)
F32_TO_F16 = Cast(torch.float32, torch.float16)
F8_TO_F32 = Cast(torch.float8_e4m3fn, torch.float32)
CASTS = (BF16_TO_F32, F32_TO_BF16, F32_TO_F16, F8_TO_F32)


def values(num_bytes: int, seed: int = 0) -> torch.Tensor:
    """Bytes that are finite numbers as bfloat16, float16 and float32."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(num_bytes // 2 + 1, generator=generator).to(torch.bfloat16)
    return numbers.view(torch.uint8)[:num_bytes].clone()


def file_of(path: Path, num_bytes: int, seed: int = 0) -> Path:
    """A file of such bytes."""
    path.write_bytes(values(num_bytes, seed).numpy().tobytes())
    return path


def host(num_bytes: int, skew: int = 0, seed: int = 0) -> HostRange:
    """Such bytes in memory, `skew` bytes behind the begin of a cache line."""
    room = torch.empty(num_bytes + 2 * CACHE_LINE_BYTES, dtype=torch.uint8)
    begin = -room.data_ptr() % CACHE_LINE_BYTES + skew
    memory = memory_of(room, begin, num_bytes)
    memory.copy_(values(num_bytes, seed))
    return HostRange(memory)


def expected(piece: Piece) -> bytes:
    """What a piece must be on the device."""
    if isinstance(piece.range, FileRange):
        begin = piece.range.offset
        stored = torch.frombuffer(
            bytearray(piece.range.file.read_bytes()[begin : begin + piece.range.num_bytes]), dtype=torch.uint8
        )
    else:
        assert isinstance(piece.range, HostRange)
        stored = piece.range.memory.clone()
    if piece.cast is not None:
        stored = stored.view(piece.cast.stored).to(piece.cast.wanted).view(torch.uint8)
    return stored.numpy().tobytes()


def random_pieces(seed: int, files: list[Path], largest: int = 9000) -> list[Piece]:
    """Pieces of files, with gaps small and large and offsets odd and even, and pieces of memory, shuffled."""
    random = Random(seed)
    pieces = []
    for file in files:
        cursor, size = 0, file.stat().st_size
        while True:
            itemsize = random.choice((1, 2, 4, 8))
            cursor += random.choice((0, 0, 0, 1, 64, 5000, 12288))
            num_bytes = random.randint(1, largest // 8) * 8
            if cursor + num_bytes > size:
                break
            cast = random.choice((None, None, None, *CASTS))
            itemsize = itemsize if cast is None else cast.wanted.itemsize
            pieces.append(Piece(FileRange(file, cursor, num_bytes), cast, itemsize))
            cursor += num_bytes
    for number in range(random.randint(0, 6)):
        cast = random.choice((None, None, *CASTS))
        itemsize = random.choice((1, 2, 4)) if cast is None else cast.wanted.itemsize
        skew = random.randrange(0, CACHE_LINE_BYTES, 4)
        pieces.append(Piece(host(random.randint(1, 900) * 8, skew, seed + number), cast, itemsize))
    random.shuffle(pieces)
    return pieces


def opens_directly(file: Path) -> bool:
    """Whether its file system knows direct reads."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True

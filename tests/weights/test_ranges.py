"""Bytes in files and in memory, and how many they are on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.weights.ranges import Cast, FileRange, HostRange, Piece, Unread, align, memory_of

FILE = Path("model.safetensors")


@pytest.mark.parametrize(
    ("piece", "num_bytes"),
    [
        (Piece(FileRange(FILE, 8, 12)), 12),
        (Piece(Unread(12)), 12),
        (Piece(HostRange(torch.zeros(12, dtype=torch.uint8))), 12),
        (Piece(FileRange(FILE, 8, 12), Cast(torch.float32, torch.bfloat16)), 6),
        (Piece(Unread(12), Cast(torch.bfloat16, torch.float32)), 24),
        (Piece(Unread(12), Cast(torch.float8_e4m3fn, torch.float64)), 96),
    ],
)
def test_a_cast_changes_the_bytes_on_the_device(piece: Piece, num_bytes: int) -> None:
    assert piece.num_bytes == num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "to", "rounded"), [(0, 256, 0), (1, 256, 256), (256, 256, 256), (257, 256, 512), (5, 1, 5)]
)
def test_align_rounds_up(num_bytes: int, to: int, rounded: int) -> None:
    assert align(num_bytes, to) == rounded


def test_memory_of_a_tensor_shares_its_bytes_and_keeps_them_alive() -> None:
    tensor = torch.arange(8, dtype=torch.float32)
    memory = memory_of(tensor[2:].view(2, 3).t(), 8, 12)
    assert memory.data_ptr() == tensor.data_ptr() + 8
    tensor[3] = 100.0
    assert memory.view(torch.float32).tolist() == [2.0, 100.0, 4.0]
    del tensor
    assert memory.view(torch.float32).tolist() == [2.0, 100.0, 4.0]


def test_memory_of_a_tensor_is_all_of_its_storage_where_nothing_else_is_said() -> None:
    tensor = torch.zeros(10, dtype=torch.float64)[4:6]
    assert memory_of(tensor).numel() == 80
    assert memory_of(tensor, 16).numel() == 64

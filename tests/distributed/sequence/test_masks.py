"""Masks of keys, of queries and keys, of every head; whole and of a piece."""

from __future__ import annotations

import pytest
import torch

from penstock.distributed.sequence.masks import mask_part, share_of_heads, whole_mask
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout
from tests.distributed.sequence.pieces import noise, streams_of, streams_on
from tests.distributed.sequences import mesh_of
from tests.ranks import run_ranks

NAMES = ("txt", "img")
LENGTHS = {"txt": 3, "img": 10}
TOKENS = torch.tensor([[1, 1, 0] + [1] * 10, [1, 0, 0] + [1] * 8 + [0] * 2]).bool()


@pytest.mark.parametrize("shape", [(2, 13), (2, 1, 13), (2, 13, 13), (2, 1, 1, 13), (2, 1, 13, 13), (1, 4, 1, 13)])
def test_whole_masks_stay_and_get_four_dims(shape: tuple[int, ...]) -> None:
    mask = noise(*shape)
    found = whole_mask(streams_of(0, 4, **LENGTHS), mask, NAMES, NAMES)
    assert found.ndim == 4
    assert found.numel() == mask.numel()
    assert torch.equal(found.flatten(), mask.flatten())


def test_what_is_expanded_is_not_carried_along() -> None:
    mask = TOKENS[:, None, None].expand(-1, 6, 3, -1)  # three queries fit nothing, but are all the same
    assert whole_mask(streams_of(0, 4, **LENGTHS), mask, NAMES, NAMES).shape == (2, 1, 1, 13)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 1, 9), "fits neither 13 keys nor the 4 of this rank"),
        ((2, 1, 5, 13), "fits neither"),
        ((2, 1, 4, 4), "says for each query of this rank which keys it sees, and not for all keys"),
    ],
)
def test_other_masks_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(GenerationError, match=rf"mask of Painter of shape .*{message}.*ulysses_degree=1"):
        whole_mask(streams_of(0, 4, **LENGTHS), noise(*shape), NAMES, NAMES)


def test_a_mask_of_two_kinds_of_tokens_cannot_be_read() -> None:
    streams = streams_of(0, 4, **LENGTHS)
    with pytest.raises(GenerationError, match="says for each query"):
        whole_mask(streams, noise(2, 1, 3, 4), ("img",), NAMES, "keys")


@pytest.mark.parametrize(("reading", "whole"), [("", ()), ("keys", ()), ("outer", ()), ("outer", ("txt",))])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_a_piece(reading: str, whole: tuple[str, ...], dtype: torch.dtype) -> None:
    assert run_ranks(4, read, reading, whole, dtype) == [True] * 4


def read(reading: str, whole: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether the mask of all tokens is found from that of a piece."""
    streams = streams_on(mesh_of(4, 1), whole, **LENGTHS)
    piece = streams.cut(TOKENS.to(dtype), Layout(NAMES))[:, None, None]
    expected = TOKENS.to(dtype)[:, None, None]
    if reading:
        piece = piece * piece.transpose(-1, -2)
    if reading == "outer":
        expected = expected * expected.transpose(-1, -2)
    return torch.equal(whole_mask(streams, piece, NAMES, NAMES, reading), expected)


def test_heads_are_dealt_out_as_those_of_the_queries_are() -> None:
    mask = torch.arange(5.0)[None, :, None, None]
    found = [share_of_heads(streams_of(rank, 2), mask).flatten().tolist() for rank in range(2)]
    assert found == [[0, 1, 2], [3, 4, 4]]
    assert share_of_heads(streams_of(1, 2), mask[:, :1]).flatten().tolist() == [0]


def test_parts_for_the_ring() -> None:
    mask = noise(2, 1, 13, 13)
    found = []
    for rank in range(4):
        streams = streams_of(rank, 2, 2, **LENGTHS)
        if rank % 2 == 0:
            found.append(torch.cat([mask_part(streams, mask, NAMES, NAMES, source) for source in range(2)], -1))
            keys = mask_part(streams, mask[:, :, :1], NAMES, NAMES, 1)
            assert torch.equal(keys, mask[:, :, :1, [2, *range(9, 13)]])
    order = [0, 1, *range(3, 9), 2, *range(9, 13)]
    assert torch.equal(torch.cat(found, -2), mask[:, :, order][..., order])

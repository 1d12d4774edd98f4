"""Tokens for heads, and back."""

from __future__ import annotations

import pytest
import torch

from penstock.distributed.sequence.trade import even_heads, to_heads, to_tokens
from penstock.models.rows.row import Layout
from tests.distributed.sequence.pieces import noise, streams_on
from tests.distributed.sequences import mesh_of
from tests.ranks import run_ranks

NAMES = ("txt", "img")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [(4, 4, 2, (4, 4)), (3, 3, 2, (4, 4)), (4, 2, 2, (4, 2)), (4, 1, 2, (4, 4)), (6, 2, 4, (8, 8)), (4, 2, 1, (4, 2))],
)
def test_heads_that_can_be_dealt_out(heads: int, kv_heads: int, size: int, expected: tuple[int, int]) -> None:
    query, key, value = noise(1, 5, heads, 2), noise(1, 5, kv_heads, 2, seed=1), noise(1, 5, kv_heads, 2, seed=2)
    queries, keys, values = even_heads(query, key, value, size)
    assert (queries.shape[2], keys.shape[2], values.shape[2]) == (*expected, expected[1])
    assert torch.equal(queries[:, :, :heads], query)
    assert not queries[:, :, heads:].any()
    if keys.shape[2] > kv_heads:
        assert torch.equal(keys[:, :, :heads], key.repeat_interleave(heads // kv_heads, 2))


@pytest.mark.parametrize("whole", [(), ("txt",), ("img",), NAMES])
@pytest.mark.parametrize("heads", [3, 6])
def test_each_rank_gets_its_heads_of_all_tokens_and_they_come_back(heads: int, whole: tuple[str, ...]) -> None:
    assert run_ranks(3, trade, heads, whole) == [(True, True)] * 3


def trade(heads: int, whole: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether heads are right on the way there, and tokens on the way back."""
    tensor, lengths = noise(2, 11, heads, 4), {"txt": 4, "img": 7}
    streams = streams_on(mesh_of(3, 1), whole, **lengths)
    piece = streams.cut(tensor, Layout(NAMES))
    (parts, (image,)) = to_heads(streams, ((piece, NAMES), (streams.cut(tensor[:, 4:], Layout(("img",))), ("img",))))
    share = heads // 3
    mine = tensor[:, :, streams.ulysses.rank * share :][:, :, :share]
    whole_parts = [torch.cat(pieces, 1)[:, : lengths[name]] for pieces, name in zip(parts, NAMES, strict=True)]
    is_image = torch.equal(torch.cat(image, 1)[:, :7], mine[:, 4:])
    is_there = is_image and torch.equal(torch.cat(whole_parts, 1), mine)
    back = to_tokens(streams, whole_parts, NAMES, heads)
    return is_there, torch.equal(streams.join(back, Layout(NAMES)), tensor)

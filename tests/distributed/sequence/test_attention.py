"""Attention over ranks is attention on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.distributed.sequence.attention import Call, Sight, attend
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout
from tests.distributed.sequence.pieces import noise, streams_of, streams_on
from tests.distributed.sequence.test_kernels import attention
from tests.distributed.sequences import mesh_of
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of

LENGTHS = {"txt": 5, "img": 13}
DEGREES = [(4, 1), (1, 4), (2, 2)]


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
@pytest.mark.parametrize("whole", [(), ("txt",)])
@pytest.mark.parametrize(("queries", "keys"), [("txt+img", "txt+img"), ("img", "img+txt"), ("txt", "img")])
@pytest.mark.parametrize("mask", ["", "keys", "pairs"])
def test_it_is_the_same(ulysses: int, ring: int, whole: tuple[str, ...], queries: str, keys: str, mask: str) -> None:
    for far, allowed in run_ranks(4, distance, (ulysses, ring), whole, queries, keys, mask):
        assert far < allowed


def test_grouped_heads_and_heads_that_do_not_divide() -> None:
    for degrees in DEGREES:
        for heads, kv_heads in ((4, 2), (6, 2), (3, 1), (5, 5)):
            for far, allowed in run_ranks(4, distance, degrees, (), "img", "img", "", heads, kv_heads):
                assert far < allowed


def test_grouped_keys_travel_as_they_are() -> None:
    one_head = 2 * 7 * 8 * 4  # bytes of one head of a piece
    for by_ulysses, by_ring in run_ranks(2, traffic_of_grouped_keys):
        assert by_ulysses == ((4 + 2 + 2) * one_head + 4 * one_head) // 2
        assert by_ring == (2 + 2) * one_head


def traffic_of_grouped_keys() -> tuple[int, int]:
    """Bytes that a rank receives for four heads of queries and two of keys, by Ulysses and by ring."""
    ulysses, ring = mesh_of(2, 1)["ulysses"].traffic, mesh_of(1, 2)["ring"].traffic
    ulysses.clear()
    ring.clear()
    for degrees in ((2, 1), (1, 2)):
        distance(degrees, (), "img", "img", "", 4, 2)
    return ulysses.received_bytes["all_to_all"], ring.received_bytes["shift"]


def distance(
    degrees: tuple[int, int],
    whole: tuple[str, ...],
    queries: str,
    keys: str,
    mask: str,
    heads: int = 4,
    kv_heads: int = 4,
) -> tuple[float, float]:
    """How far attention of this rank's tokens, gathered, is from that of all; and how far it may be."""
    asking, asked = Layout.of(queries), Layout.of(keys)
    num_queries, num_keys = (sum(LENGTHS[name] for name in layout.streams) for layout in (asking, asked))
    query, key = noise(2, num_queries, heads, 8), noise(2, num_keys, kv_heads, 8, seed=1)
    value = noise(2, num_keys, kv_heads, 8, seed=2)
    shape = {"": None, "keys": (2, 1, 1, num_keys), "pairs": (2, 1, num_queries, num_keys)}[mask]
    sees = None if shape is None else noise(*shape, seed=3) > 0
    streams = streams_on(mesh_of(*degrees), whole, **LENGTHS)
    call = Call(streams.cut(query, asking), streams.cut(key, asked), streams.cut(value, asked), sees)
    found = streams.join(attend(Sight(streams, asking.streams, asked.streams), call, kernel), asking)
    return far_from_one(found, query, key, value, sees)


def far_from_one(found: Tensor, *given: Tensor | None) -> tuple[float, float]:
    """How far something is from attention on one rank, and how far it may be."""
    plain = [attention(*given, None)]
    moving = [tensor for tensor in given if tensor is not None]
    return difference([found], plain), tolerance_of(moving, lambda: [attention(*given, None)], plain)


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The user's own."""
    return attention(query, key, value, mask, None)


def test_tokens_that_are_left_out_of_a_stream_that_is_whole() -> None:
    for far, allowed in run_ranks(4, distance_of_fewer, (2, 2)):
        assert far < allowed


def distance_of_fewer(degrees: tuple[int, int]) -> tuple[float, float]:
    """The same, where two of the text's five tokens do not take part."""
    layout = Layout.of("img+txt")
    streams = streams_on(mesh_of(*degrees), ("txt",), **LENGTHS)
    query, key, value = (noise(2, 18, 4, 8, seed=seed) for seed in range(3))
    local = [streams.cut(tensor, layout)[:, :-2] for tensor in (query, key, value)]
    found = attend(Sight(streams, layout.streams, layout.streams, "absent"), Call(*local), kernel)
    assert streams.lengths == LENGTHS
    short = streams_on(mesh_of(*degrees), ("txt",), img=13, txt=3)
    return far_from_one(short.join(found, layout), query[:, :-2], key[:, :-2], value[:, :-2], None)


@pytest.mark.parametrize("other", [{"query": 4}, {"key": 4}])
def test_other_tokens_are_refused(other: dict[str, int]) -> None:
    tensors: dict[str, Any] = {name: noise(1, 3, 2, 8) for name in ("query", "key", "value")}
    tensors |= {name: noise(1, count, 2, 8) for name, count in other.items()}
    with pytest.raises(GenerationError, match=r"attention of Painter has 4 .*, where img are 3 on this rank"):
        attend(Sight(streams_of(0, 2, img=6), ("img",), ("img",)), Call(**tensors), kernel)


def test_causal_attention_works_with_ulysses_and_not_around_a_ring() -> None:
    assert run_ranks(2, causal, (2, 1)) == ["", ""]
    for said in run_ranks(2, causal, (1, 2)):
        assert said.startswith("causal attention cannot go around a ring of 2")


def causal(degrees: tuple[int, int]) -> str:
    """What is said to causal attention; nothing where it is right."""
    streams = streams_on(mesh_of(*degrees), **LENGTHS)
    layout = Layout.of("img")
    tensor = noise(1, 13, 2, 8)
    piece = streams.cut(tensor, layout)
    sees = torch.ones(13, 13, dtype=torch.bool).tril()
    try:
        found = attend(
            Sight(streams, ("img",), ("img",)),
            Call(piece, piece, piece, is_causal=True),
            lambda query, key, value, mask: attention(query, key, value, sees, None),
        )
    except GenerationError as error:
        return str(error)
    far, allowed = far_from_one(streams.join(found, layout), tensor, tensor, tensor, sees)
    assert far < allowed
    return ""

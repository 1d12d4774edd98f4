"""Streams told by their lengths: pieces that cannot be mistaken, joins in order, and errors where nothing helps."""

from __future__ import annotations

import pytest
import torch

from penstock.distributed.group import Group
from penstock.distributed.sequence.lengths import Joins, MeasuredStreams
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout


def streams_of(ranks: int, rank: int = 0, whole: tuple[int, ...] = ()) -> MeasuredStreams:
    group = Group("sequence", rank, tuple(range(ranks)), None)
    streams = MeasuredStreams(group, group, Group("ring", 0, (0,), None))
    streams.begin(whole)
    return streams


def test_a_piece_is_a_ceiling() -> None:
    streams = streams_of(4)
    assert [streams.piece(streams.open(length, may_pad=True)) for length in (64, 45, 7, 1)] == [16, 12, 2, 1]


@pytest.mark.parametrize("length", [1, 5, 63])
def test_without_pads_a_length_must_divide(length: int) -> None:
    streams = streams_of(4)
    assert streams.piece(streams.open(64, may_pad=False)) == 16
    with pytest.raises(ValueError, match=f"{length} tokens do not divide over 4 ranks.*auto_pad=True"):
        streams.open(length, may_pad=False)


def test_pieces_of_padded_streams_differ_from_each_other_and_from_whole_ones() -> None:
    streams = streams_of(2, whole=(32,))
    names = [streams.open(length, may_pad=True) for length in (64, 63, 65)]
    assert [streams.piece(name) for name in names] == [33, 34, 35]
    for name in names:
        assert streams.seen_as(streams.piece(name)) == (name,)
    assert streams.seen_as(32) is None


@pytest.mark.parametrize("length", [64, 63, 5, 1])
def test_longer_pieces_hold_the_same_tokens(length: int) -> None:
    whole = torch.arange(length)[None]
    kept = []
    for rank in range(4):
        streams = streams_of(4, rank, whole=(-(-length // 4),))
        name = streams.open(length, may_pad=True)
        kept.append(streams.cut(whole, Layout((name,), 1)))
    assert len({part.shape for part in kept}) == 1
    assert torch.equal(torch.cat(kept, 1)[:, :length], whole)


def test_one_length_is_one_stream() -> None:
    streams = streams_of(2)
    assert streams.open(64, may_pad=True) == streams.open(64, may_pad=False)
    assert streams.num_open == 1


def test_text_and_image_make_one_length() -> None:
    streams = streams_of(2)
    names = streams.open_after(7, 45)
    assert [streams.is_whole(name) for name in names] == [True, False]
    assert streams.seen_as(7 + 23) == streams.joined_as(7 + 23) == names
    assert streams.seen_as(23) == names[1:]


def joined(streams: MeasuredStreams, *sizes: int, dim: int = 1, ndim: int = 3) -> None:
    joins = Joins()
    shape = [2] * ndim
    parts = []
    for size in sizes:
        shape[dim] = size
        parts.append(torch.zeros(shape))
    with joins:
        torch.cat(parts, dim=dim)
    lengths = dict(streams.lengths)
    streams.begin(streams._whole_lengths, joins.found)
    for length in lengths.values():
        streams.open(length, may_pad=True)


@pytest.mark.parametrize(("sizes", "names"), [((4, 23), ("7", "45")), ((23, 4), ("45", "7"))])
def test_a_join_tells_the_order(sizes: tuple[int, int], names: tuple[str, str]) -> None:
    streams = streams_of(2)
    for length in (7, 45):
        streams.open(length, may_pad=True)
    with pytest.raises(GenerationError, match=r"27 tokens .* several streams together \(4 of 7, 23 of 45\)"):
        streams.seen_as(27)
    joined(streams, *sizes)
    assert streams.seen_as(27) == names


def test_what_is_joined_and_was_not_cut_is_whole() -> None:
    streams = streams_of(2)
    streams.open(45, may_pad=True)
    joined(streams, 3, 23)
    assert streams.seen_as(26) == ("3 whole", "45")


@pytest.mark.parametrize(("dim", "ndim"), [(0, 3), (2, 3), (0, 2), (1, 2)])
def test_joined_batches_and_features_say_nothing(dim: int, ndim: int) -> None:
    streams = streams_of(2)
    streams.open(45, may_pad=True)
    joined(streams, 3, 23, dim=dim, ndim=ndim)
    assert streams.seen_as(26) is None


@pytest.mark.parametrize("spell", [torch.cat, torch.concat, torch.concatenate])
def test_every_spelling_of_a_join_counts(spell: object) -> None:
    joins = Joins()
    with joins:
        spell([torch.zeros(1, 2, 4), torch.zeros(1, 5, 4)], axis=1)  # type: ignore[operator]
    assert joins.found == {7: {(2, 5)}}


def test_two_orders_are_an_error() -> None:
    streams = streams_of(2)
    for length in (7, 45):
        streams.open(length, may_pad=True)
    streams._joins = {27: {(4, 23), (23, 4)}}
    with pytest.raises(GenerationError, match=r"27 tokens .* a piece of 45 \+ 7 or a piece of 7 \+ 45"):
        streams.seen_as(27)


def test_a_whole_length_that_looks_cut_is_an_error() -> None:
    streams = streams_of(2, whole=(8,))
    streams.open(16, may_pad=False)
    with pytest.raises(GenerationError, match=r"8 tokens .* a piece of 16 or 8 that every rank holds.*auto_pad=True"):
        streams.seen_as(8)


def test_a_gather_needs_one_stream() -> None:
    streams = streams_of(2)
    streams.open(63, may_pad=True)
    with pytest.raises(GenerationError, match=r"5 tokens .* no stream .* there are 32 of 63"):
        streams.joined_as(5)
    streams.open(64, may_pad=False)
    with pytest.raises(
        GenerationError, match=r"32 tokens .* a piece of 63 and a piece of 64 have as many.*shard_group"
    ):
        streams.joined_as(32)


def test_what_was_joined_is_no_longer_seen() -> None:
    streams = streams_of(2)
    name = streams.open(64, may_pad=True)
    streams.close([name])
    assert streams.seen_as(32) is None
    assert streams.joined_as(32) == (name,)
    streams.open(64, may_pad=True)
    assert streams.seen_as(32) == (name,)
    streams.begin()
    assert not streams.num_open

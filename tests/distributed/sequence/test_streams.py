"""Who holds which tokens."""

from __future__ import annotations

import pytest
import torch

from penstock.errors import GenerationError
from penstock.models.rows.row import Layout
from tests.distributed.sequence.pieces import noise, streams_of, streams_on
from tests.distributed.sequences import mesh_of
from tests.ranks import run_ranks

IMG, BOTH = Layout.of("img"), Layout.of("txt+img")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 17])
def test_pieces_are_equal_and_make_up_the_whole(length: int, ranks: int) -> None:
    tensor = torch.arange(1, length + 1)[None, :, None]
    pieces = [streams_of(rank, ranks).cut(tensor, IMG) for rank in range(ranks)]
    assert {piece.shape for piece in pieces} == {(1, -(-length // ranks), 1)}
    together = torch.cat(pieces, 1)
    assert torch.equal(together[:, :length], tensor)
    assert (together[:, length:] == length).all(), "pads are the last token"


def test_what_was_cut_stays_and_what_is_for_all_tokens_too() -> None:
    streams = streams_of(1, 4)
    piece = streams.cut(noise(2, 10, 3), IMG)
    assert piece.shape == (2, 3, 3)
    assert streams.cut(piece, IMG) is piece
    one = noise(2, 1, 3)
    assert streams.cut(one, IMG) is one
    assert streams.cut(one, Layout(())) is one
    other = noise(2, 10)
    assert streams.cut(other, Layout.of("img:1/3")) is other


def test_several_streams_in_one_tensor() -> None:
    streams = streams_of(1, 2, img=5, txt=3)
    tensor = torch.arange(8)[None]
    assert streams.cut(tensor, BOTH).tolist() == [[2, 2, 6, 7, 7]]
    streams = streams_of(1, 2, whole=("txt",), img=5, txt=3)
    assert streams.cut(tensor, BOTH).tolist() == [[0, 1, 2, 6, 7, 7]]
    assert streams.is_whole("txt")
    assert (streams.local("txt"), streams.local("img")) == (3, 3)


def test_lengths_are_forgotten_at_the_next_forward() -> None:
    streams = streams_of(0, 2)
    streams.cut(noise(1, 10, 1), IMG)
    streams.begin()
    assert streams.cut(noise(1, 6, 1), IMG).shape[1] == 3


def test_another_length_is_an_error_that_names_all() -> None:
    streams = streams_of(0, 2, img=10)
    with pytest.raises(GenerationError, match=r"rope has 9 entries along dim 1, where img have 10: the row of Painter"):
        streams.cut(noise(1, 9, 1), IMG, "rope")
    with pytest.raises(GenerationError, match=r"the length of txt is not known yet.*the row of Painter"):
        streams.cut(noise(1, 9, 1), BOTH, "rope")


@pytest.mark.parametrize("number", [0, 1, 4, 5, 9, 10])
def test_counts_of_the_first_and_of_the_last_tokens(number: int) -> None:
    ranks = [streams_of(rank, 4, img=10) for rank in range(4)]
    marks = (torch.arange(10) < number).long()[None]
    for streams in ranks:
        piece = streams.cut(marks, IMG)
        if number < 10:  # else the pads are among the first as well
            assert streams.count(number, "img") == piece.sum()
        assert streams.count(10 - number, "img", from_end=True) + streams.count(number, "img") == 3
    assert streams_of(0, 4, whole=("img",), img=10).count(number, "img") == number


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 4), (4, 1), (2, 4)])
def test_ring_ranks_hold_one_run_after_the_other(ulysses: int, ring: int) -> None:
    streams = streams_of(0, ulysses, ring, whole=("txt",), img=13, txt=5)
    runs = [streams.run("img", rank) for rank in range(ring)]
    assert [start for start, _ in runs] == [min(sum(width for _, width in runs[:i]), 13) for i in range(ring)]
    assert sum(width for _, width in runs) == 13
    assert [streams.run("txt", rank)[1] for rank in range(ring)] == [5] + [0] * (ring - 1)


@pytest.mark.parametrize("layout", ["img", "txt+img", "img:2", "img+txt:-1"])
def test_joining_undoes_cutting(layout: str) -> None:
    assert run_ranks(3, cut_and_join, layout) == [True] * 3


def cut_and_join(text: str) -> bool:
    """Whether a tensor comes back whole."""
    layout, lengths = Layout.of(text), {"img": 10, "txt": 4}
    length = sum(lengths[name] for name in layout.streams)
    tensor = noise(2, length, length)
    streams = streams_on(mesh_of(3, 1), ("txt",), **lengths)
    piece = streams.cut(tensor, layout)
    return piece.shape != tensor.shape and torch.equal(streams.join(piece, layout), tensor)


@pytest.mark.parametrize("layout", ["txt", "txt+img"])
def test_what_is_whole_is_the_same_on_all_ranks_once_joined(layout: str) -> None:
    first, *others = run_ranks(3, join_unequal, layout)
    assert others == [first, first]


def join_unequal(text: str) -> list[float]:
    """What is joined where text, whole on every rank, differs in the last bits, as it does behind a ring."""
    layout = Layout.of(text)
    streams = streams_on(mesh_of(1, 3), ("txt",), img=6, txt=4)
    mine = torch.ones(1, sum(map(streams.local, layout.streams))) * (1 + streams.group.rank * 1e-6)
    kept = mine.clone()
    joined = streams.join(mine, layout)
    assert torch.equal(mine, kept)
    return joined[0, :4].tolist()

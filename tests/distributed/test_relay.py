"""Streams arrive as they were, where they are needed, and nowhere else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from penstock.distributed.relay import HEAD_BYTES, Gate, Relay, carriers
from penstock.errors import DeclarationError, GenerationError
from penstock.models.rows.row import StackRow
from tests.ranks import run_ranks

STACK = StackRow(
    "blocks", takes={"img": "img", "temb": "img", "txt": "txt", "rope": ("txt+img:0",) * 2}, gives=("txt", "img")
)


class Joint(nn.Module):
    def forward(self, img: Tensor, txt: Tensor | None = None, temb: Tensor | None = None) -> Any:
        return txt, img + 1


def group() -> Group:
    found = build_mesh(ParallelConfig(pipeline_parallel_size=3), "cpu")["pipeline"]
    found.traffic.clear()
    return found


def streams_of(rank: int) -> list[Tensor | None]:
    """Of other shapes and dtypes on each rank, none of them contiguous."""
    image = (torch.arange(24.0) + rank).view(2, 3, 4 * 1).transpose(1, 2)
    mask = torch.ones(rank + 1, 2, dtype=torch.bool)[:, :1]
    return [image.to([torch.float32, torch.bfloat16, torch.float64][rank]), None if rank else image, mask]


def are_of(streams: list[Tensor | None], rank: int) -> bool:
    return all(
        one is other is None
        or (one is not None and other is not None and one.dtype == other.dtype and one.equal(other))
        for one, other in zip(streams, streams_of(rank), strict=True)
    )


def run_crossing() -> None:
    ranks = group()
    relay = Relay(ranks)
    mine = streams_of(ranks.rank)
    relay.begin()
    assert all(relay.cross(mine, stage=1)[i] is mine[i] for i in range(3)) and not ranks.traffic.num_calls
    assert relay.holder == 1
    taken = relay.cross(mine, stage=2)
    assert are_of(taken, 1 if ranks.rank == 2 else ranks.rank)
    size = sum(stream.nbytes for stream in streams_of(1) if stream is not None) + 3 * HEAD_BYTES
    assert ranks.traffic.received_bytes["receive"] == (size if ranks.rank == 2 else 0)
    relay.cross(mine, stage=2)
    assert sum(ranks.traffic.num_calls.values()) == (0 if ranks.rank == 0 else 3)
    assert are_of(relay.cross(mine, stage=0), 2 if ranks.rank == 0 else ranks.rank)
    with pytest.raises(GenerationError, match="ended on stage 0 of 3"):
        relay.end()
    assert are_of(relay.spread(mine), 0)
    relay.end()
    assert are_of(relay.spread(mine), ranks.rank)


def test_streams_follow_the_blocks() -> None:
    run_ranks(3, run_crossing)


DTYPES = (torch.uint8, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.complex32, torch.complex128)


def are_ones(streams: list[Tensor | None], rank: int) -> bool:
    expected = [torch.full((2, 3), float(rank)).to(dtype) for dtype in DTYPES] + [torch.tensor(rank), torch.zeros(0, 3)]
    return all(
        one is not None and one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()
        for one, other in zip(streams, expected, strict=True)
    )


def run_dtypes() -> None:
    ranks = group()
    relay = Relay(ranks)
    mine: list[Tensor | None] = [torch.full((2, 3), float(ranks.rank)).to(dtype) for dtype in DTYPES]
    mine.extend([torch.tensor(ranks.rank), torch.zeros(0, 3)])
    relay.begin()
    relay.cross(mine, stage=2)
    assert are_ones(relay.cross(mine, stage=1), 2 if ranks.rank == 1 else ranks.rank)
    assert are_ones(relay.spread(mine), 1)


def test_streams_of_any_dtype_arrive() -> None:
    run_ranks(3, run_dtypes)


def run_gates() -> None:
    ranks = group()
    relay = Relay(ranks)
    first, last = (Gate(relay, stage, STACK, Joint(), is_last=stage == 2) for stage in (0, 2))
    image, text = torch.full((1, 2), float(ranks.rank)), torch.zeros(1, 3)
    relay.begin()
    args, kwargs = first.enter((image,), {"txt": text})
    assert args[0] is image and kwargs["txt"] is text
    assert first.leave("anything") == "anything"
    shown = first.placeholder((image,), {"txt": text})
    assert [one.shape for one in shown] == [text.shape, image.shape] and all(one.isnan().all() for one in shown)
    assert first.placeholder((image,), {})[0] is None
    args, kwargs = last.enter((image,), {"temb": image} if ranks.rank else {"txt": text, "temb": image})
    assert args[0].eq(0 if ranks.rank == 2 else ranks.rank).all() and kwargs["temb"] is image
    assert ("txt" in kwargs) == (ranks.rank != 1)
    dropped, given = last.leave((None, image) if ranks.rank == 2 else (text, image))
    assert dropped is None and given.eq(2).all()


def test_gates_find_streams_by_name_or_place() -> None:
    run_ranks(3, run_gates)


def test_carriers_are_the_first_arguments_of_the_same_layout() -> None:
    assert carriers(STACK) == ("txt", "img")


@pytest.mark.parametrize("given", ["aud", "txt+img:0", "img:2", ""])
def test_what_no_argument_carries_is_refused(given: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(f"blocks give {given!r}")):
        carriers(StackRow("blocks", takes=STACK.takes, gives=("img", given)))

"""Strips themselves: what they say of their tensor, how rows travel, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from penstock.distributed.patch.layout import Layout
from penstock.distributed.patch.strip import Exchange, Strip
from penstock.errors import GenerationError
from tests.distributed.patch.pieces import draw, group_of_all, picture, strip_of
from tests.ranks import run_ranks


def described() -> bool:
    x = picture()
    strip = strip_of(x, 2)
    turned, plain = strip.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    assert (strip.shape, strip.dtype, strip.device, strip.ndim) == (x.shape, x.dtype, x.device, 4)
    assert (strip.stride(), turned.stride()) == (x.stride(), plain.stride())
    assert strip.is_contiguous() and not turned.is_contiguous()
    assert strip.numel() == x.numel() > strip.local.numel()
    assert strip.tolist() == x.tolist() and (strip.numpy() == x.numpy()).all()
    assert float(strip.sum()) == pytest.approx(float(x.sum()), abs=1e-4)
    if dist.get_rank() == 0:  # one rank may print alone
        assert repr(strip).startswith("Strip(rows (0, 6) of dim 2, shape=(2, 4, 16, 6)")
    assert torch.equal(copy.deepcopy(strip), x)
    assert bool((strip == x).all())
    return torch.equal(strip.whole(), x)


def test_a_strip_is_taken_for_the_whole_tensor() -> None:
    assert run_ranks(3, described) == [True] * 3


def travel() -> tuple[bool, dict[str, int], int]:
    group = group_of_all()
    exchange = Exchange(group)
    whole = draw(3, 20, 2)
    layout = Layout(1, (0, 3, 4, 5), outer=2, inner=2)
    strip = exchange.strip(whole, layout)
    needs = [(-1, 4), (0, 5), (4, 7)]
    begin, end = needs[group.rank]
    rows = exchange.rows(strip.local, layout, needs).unflatten(1, (2, end - begin, 2))
    padded = torch.nn.functional.pad(whole.unflatten(1, (2, 5, 2)), (0, 0, 0, 0, 1, 2))
    nothing_moves = exchange.rows(strip.local, layout, layout.ranges()) is strip.local
    is_right = torch.equal(rows, padded[:, :, begin + 1 : end + 1]) and nothing_moves
    return is_right, dict(group.traffic.num_calls), group.traffic.received_bytes["trade"]


def test_rows_come_from_those_that_hold_them() -> None:
    ranks = run_ranks(3, travel)
    row_bytes = 3 * 2 * 2 * 2 * 4
    assert [found[0] for found in ranks] == [True] * 3
    assert [found[1] for found in ranks] == [{"trade": 1}] * 3
    assert [found[2] for found in ranks] == [row_bytes, 4 * row_bytes, 0]


def write_to_rows() -> bool:
    strip = strip_of(picture(), 2)
    for key in ((slice(None), slice(None), 3), (slice(None), slice(None), slice(0, 2))):
        with pytest.raises(GenerationError, match=r"writes to a part of a tensor of shape .*vae-parallel-mode tile"):
            strip[key] = 0.0
    with pytest.raises(GenerationError, match="writes to a part"):
        strip[:, :, 1].add_(1)
    with pytest.raises(GenerationError, match="writes to a part"):
        strip.index_put_((torch.tensor([0]),), torch.tensor(1.0))
    first = strip.clone()
    first[:, 1] = 5.0  # in each rank's rows
    return bool((first[:, 1] == 5.0).all())


def test_writing_to_what_is_no_view_of_its_rows_is_refused() -> None:
    assert run_ranks(2, write_to_rows) == [True, True]


def in_inference_mode() -> float:
    conv = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    torch.nn.init.ones_(conv[0].weight)
    torch.nn.init.zeros_(conv[0].bias)
    with torch.inference_mode():
        result = conv(strip_of(picture(), 2))
        assert isinstance(result, Strip) and not result.exchange.whole
        return float((result.whole() - conv(picture())).abs().max())


def test_inference_mode_changes_nothing() -> None:
    assert max(run_ranks(2, in_inference_mode)) < 1e-5

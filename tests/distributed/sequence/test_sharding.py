"""Pieces and wholes: every dtype and layout, lengths that no number of ranks divides, and what was never gathered."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from penstock.config import ParallelConfig
from penstock.distributed import (
    ShardingValidator,
    get_sharding_validator,
    sp_gather,
    sp_shard,
    sp_shard_with_padding,
)
from penstock.distributed.mesh import Mesh, build_mesh
from penstock.distributed.parallel_state import set_mesh
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    set_mesh(build_mesh(ParallelConfig(), "cpu"))
    yield
    set_mesh(None)


def meet(ranks: int) -> Mesh:
    ring = 2 if ranks == 4 else 1
    mesh = build_mesh(ParallelConfig(ulysses_degree=ranks // ring, ring_degree=ring), "cpu")
    set_mesh(mesh)
    return mesh


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(2 * length * 3).reshape(2, length, 3) % 7).to(dtype)


def there_and_back(ranks: int, whole: Tensor, dim: int) -> tuple[tuple[int, ...], bool, Tensor]:
    meet(ranks)
    piece = sp_shard(whole, dim)
    return tuple(piece.shape), piece.is_contiguous(), sp_gather(piece, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_gather_gives_back_what_was_split(ranks: int, dtype: torch.dtype) -> None:
    whole = tokens(8, dtype)
    for shape, is_contiguous, back in run_ranks(ranks, there_and_back, ranks, whole, 1):
        assert shape == (2, 8 // ranks, 3)
        assert is_contiguous
        assert back.dtype == dtype
        assert torch.equal(back.float(), whole.float())


@pytest.mark.parametrize("dim", [0, -1, 2])
def test_any_dim_of_any_layout(dim: int) -> None:
    whole = tokens(8).permute(1, 0, 2).repeat(1, 2, 4).transpose(0, 2)[:, :, ::1]
    assert not whole.is_contiguous()
    for shape, is_contiguous, back in run_ranks(4, there_and_back, 4, whole, dim):
        assert shape[dim] == whole.shape[dim] // 4
        assert is_contiguous
        assert torch.equal(back, whole)


def padded(ranks: int, whole: Tensor, pad_value: float) -> tuple[Tensor, int, Tensor]:
    meet(ranks)
    piece, padding = sp_shard_with_padding(whole, 1, pad_value)
    return piece, padding, sp_gather(piece, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranks", "length", "padding"), [(4, 5, 3), (4, 1, 3), (4, 8, 0), (2, 5, 1), (4, 0, 0)])
def test_padding_is_at_the_end(ranks: int, length: int, padding: int, dtype: torch.dtype) -> None:
    whole = tokens(length, dtype)
    for piece, told, back in run_ranks(ranks, padded, ranks, whole, 1.0):
        assert told == padding
        assert piece.shape == (2, (length + padding) // ranks, 3)
        assert torch.equal(back.narrow(1, 0, length).float(), whole.float())
        assert torch.equal(back.narrow(1, length, padding).float(), torch.ones(2, padding, 3))


def filled(whole: Tensor) -> tuple[Tensor, Tensor]:
    meet(4)
    piece = sp_shard(whole, 1, validate=False)
    return piece, sp_gather(piece, 1)


def test_five_tokens_leave_no_rank_without() -> None:
    whole = tokens(5)
    for piece, back in run_ranks(4, filled, whole):
        assert piece.shape == (2, 2, 3)
        assert torch.equal(back[:, :5], whole)
        assert torch.equal(back[:, 5:], whole[:, 4:].expand(2, 3, 3))


def refusal(length: int) -> str:
    meet(4)
    with pytest.raises(ValueError) as caught:
        sp_shard(tokens(length), 1)
    return str(caught.value)


def test_a_length_that_does_not_divide_is_refused() -> None:
    for told in run_ranks(4, refusal, 9):
        assert re.match(r"9 tokens \(dim 1 of \(2, 9, 3\)\) do not divide over 4 ranks.*or 8 or 12 tokens", told)


def unequal(differ: str) -> str:
    rank = meet(2)["sequence"].rank
    piece = tokens(3 + rank) if differ == "length" else tokens(3, (torch.float32, torch.int64)[rank])
    with pytest.raises(ValueError) as caught:
        sp_gather(piece, 1)
    return str(caught.value)


@pytest.mark.parametrize(("differ", "told"), [("length", r"\(2, 4, 3\)"), ("dtype", "torch.int64")])
def test_unequal_pieces_are_refused_on_every_rank(differ: str, told: str) -> None:
    for message in run_ranks(2, unequal, differ):
        assert re.search(rf"2 kinds of pieces \(rank 0: \(2, 3, 3\) torch.float32; rank 1: .*{told}", message)


def num_gathers(validate: bool) -> int:
    mesh = meet(2)
    mesh["sequence"].traffic.clear()
    sp_gather(tokens(3), 1, validate=validate)
    return mesh["sequence"].traffic.num_calls["all_gather"]


def test_without_the_check_there_is_one_exchange() -> None:
    assert run_ranks(2, num_gathers, False) == [1, 1]
    assert run_ranks(2, num_gathers, True) == [2, 2]


def test_one_rank_keeps_its_tensor() -> None:
    whole = tokens(5)
    assert sp_shard(whole, 1) is whole
    assert sp_gather(whole, 1) is whole
    piece, padding = sp_shard_with_padding(whole, 1)
    assert (piece is whole, padding) == (True, 0)


def test_without_a_mesh_nothing_is_split() -> None:
    set_mesh(None)
    for call in (sp_shard, sp_gather, sp_shard_with_padding):
        with pytest.raises(RuntimeError, match="not initialised"):
            call(tokens(4), 1)


def validated(gather: tuple[str, ...]) -> tuple[bool, str]:
    meet(2)
    validator = get_sharding_validator()
    whole = tokens(4)
    with validator.track() as tracked:
        assert tracked is validator
        pieces = {name: validator.shard(whole, name, dim=1) for name in ("image", "text")}
        backs = [validator.gather(pieces[name], name, dim=1) for name in gather]
    is_back = all(torch.equal(back, whole) for back in backs)
    try:
        validator.validate()
    except ValueError as error:
        return is_back, str(error)
    return is_back, ""


def test_what_was_never_gathered_is_named() -> None:
    assert run_ranks(2, validated, ("image", "text")) == [(True, "")] * 2
    for is_back, told in run_ranks(2, validated, ("image",)):
        assert is_back
        assert told.startswith("1 of 2 split tensors were never gathered: text.")


def test_the_process_has_one_validator() -> None:
    assert get_sharding_validator() is get_sharding_validator()
    assert isinstance(get_sharding_validator(), ShardingValidator)


def test_only_what_happens_while_tracking_counts() -> None:
    validator = ShardingValidator()
    validator.shard(tokens(4), "before", dim=1)
    validator.validate()
    with validator.track():
        validator.shard(tokens(4), "within", dim=1)
    with pytest.raises(ValueError, match="within"):
        validator.validate()
    validator.reset()
    validator.validate()


def test_tracking_ends_where_the_work_fails() -> None:
    validator = ShardingValidator()
    with pytest.raises(ZeroDivisionError), validator.track():
        raise ZeroDivisionError
    validator.shard(tokens(4), "after", dim=1)
    validator.validate()


def test_odd_uses_are_warned_about() -> None:
    validator = ShardingValidator()
    with validator.track():
        validator.shard(tokens(4), "image", dim=1)
        with pytest.warns(UserWarning, match="'image' is split twice"):
            validator.shard(tokens(4), "image", dim=1)
        with pytest.warns(UserWarning, match="'text' is gathered, and was never split"):
            validator.gather(tokens(4), "text", dim=1)
        validator.gather(tokens(4), "image", dim=1)
        validator.shard(tokens(4), "image", dim=1)
    with pytest.raises(ValueError, match="image"):
        validator.validate()


def divided(validate_divisible: bool) -> tuple[int, ...]:
    meet(4)
    validator = ShardingValidator()
    try:
        return tuple(validator.shard(tokens(5), "image", 1, validate_divisible=validate_divisible).shape)
    except ValueError:
        return ()


def test_the_validator_splits_as_asked() -> None:
    assert run_ranks(4, divided, True) == [()] * 4
    assert run_ranks(4, divided, False) == [(2, 2, 3)] * 4

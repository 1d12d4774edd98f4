"""Norms, reductions, products and attention over rows, against one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.distributed.patch.autoencoder import put_together
from tests.distributed.patch.pieces import Deaf, compared, draw, group_of_all, picture, strip_of
from tests.ranks import run_ranks


def tokens(x: Tensor) -> Tensor:
    """(2, 96, 4)"""
    return x.flatten(2).transpose(1, 2)


def attended(x: Tensor, **options: Any) -> Tensor:
    heads = tokens(x).unflatten(2, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads * 2, heads - 1, **options)


def linear_attention(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return (F.pad(flat, (0, 0, 0, 1), value=1.0) @ flat.transpose(1, 2)) @ F.relu(flat)


SUMS: dict[str, Any] = {
    "group norm": lambda x: F.group_norm(x * 3 + 100, 2, draw(4), draw(4)),
    "bare group norm": lambda x: F.group_norm(x, 4),
    "group norm of tokens": lambda x: F.group_norm(x.flatten(2), 2),
    "layer norm of channels": lambda x: F.layer_norm(x.movedim(1, -1), (4,), draw(4)),
    "rms norm of channels": lambda x: F.rms_norm(x.movedim(1, -1), (4,), draw(4)),
    "normalized": lambda x: F.normalize(x, dim=1) * draw(4, 1, 1),
    "batch norm": lambda x: F.batch_norm(x, draw(4), draw(4).abs() + 1, draw(4)),
    "mean of rows": lambda x: x - x.mean((2, 3), keepdim=True),
    "sum of all": lambda x: x.sum() + x.mean(),
    "mean of channels": lambda x: x.pow(2).mean(1),
    "largest of channels": lambda x: x.amax(1, keepdim=True) + x.var(1, keepdim=True),
    "linear": lambda x: F.linear(tokens(x), draw(5, 4), draw(5)),
    "linear on channels": lambda x: nn.Linear(4, 4).requires_grad_(False)(x.movedim(1, -1)) * 0 + x.movedim(1, -1),
    "attention": attended,
    "attention with a mask": lambda x: attended(x, attn_mask=draw(96, 96) > 0),
    "attention within rows": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 1)] * 3),
    "attention by matrices": lambda x: (
        torch.baddbmm(draw(2, 96, 96), tokens(x), tokens(x).transpose(1, 2), beta=0, alpha=0.5).softmax(-1) @ tokens(x)
    ),
    "linear attention": linear_attention,
    "einsum": lambda x: torch.einsum("bchw,cd->bdhw", x, draw(4, 3)),
}
WHOLE: dict[str, Any] = {
    "causal attention": lambda x: attended(x, is_causal=True),
    "layer norm of rows": lambda x: F.layer_norm(x, (4, 16, 6)),
    "largest of rows": lambda x: x.amax(2),
    "softmax over rows": lambda x: x.softmax(2),
    "sum of short floats": lambda x: (x.flatten(2).bfloat16() @ tokens(x).bfloat16()).float() * 1e-9 + x.sum(),
}


def every(names: list[str]) -> dict[str, tuple[float, bool]]:
    return {name: compared((SUMS | WHOLE)[name], picture(), 2) for name in names}


def test_sums_over_rows_are_those_of_one_rank() -> None:
    for found in run_ranks(3, every, list(SUMS)):
        assert {name: far for name, (far, _) in found.items() if far > 2e-6} == {}
        assert [name for name, (_, is_split) in found.items() if not is_split] == []


def test_what_needs_all_rows_at_once_is_right_nevertheless() -> None:
    for found in run_ranks(2, every, list(WHOLE)):
        assert {name: far for name, (far, _) in found.items() if far > 2e-6} == {}
        assert [name for name, (_, is_split) in found.items() if is_split] == []


def deaf(name: str) -> float:
    group = group_of_all(Deaf)
    strip = strip_of(picture(), 2, group)
    begin, end = (0, 6) if group.rank == 0 else (6, 16)
    expected, result = SUMS[name](picture()), SUMS[name](strip)
    own = put_together(result)
    return float((own - expected)[:, :, begin:end].abs().max())


def test_without_the_other_ranks_sums_are_wrong() -> None:
    for name in ("group norm", "linear attention", "mean of rows"):
        assert max(run_ranks(2, deaf, name)) > 0.01


def test_short_floats_are_summed_in_long_ones() -> None:
    x = picture().bfloat16()
    control = float((F.group_norm(x, 2).float() - F.group_norm(x.float(), 2)).abs().max())
    assert max(run_ranks(2, short_distance)) <= 1.5 * control


def short_distance() -> float:
    x = picture().bfloat16()
    result = put_together(F.group_norm(strip_of(x, 2), 2))
    return float((result.float() - F.group_norm(x.float(), 2)).abs().max())

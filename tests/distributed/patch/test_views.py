"""Strips reshaped, cut and joined, against one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.distributed.patch.pieces import compared, draw, picture
from tests.ranks import run_ranks

VIEWS: dict[str, Any] = {
    "attention": lambda x: x.view(2, 4, -1).transpose(1, 2).reshape(2, -1, 2, 2),
    "patches": lambda x: x.reshape(2, 4, 8, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3),
    "merged with the batch": lambda x: x.transpose(1, 2).flatten(0, 1) @ draw(6, 3),
    "cut elsewhere": lambda x: torch.cat([*x.chunk(2, 1)][::-1], 1)[..., 1:],
    "one channel": lambda x: x[:, 2].unsqueeze(1).expand(-1, 3, -1, -1),
    "stacked": lambda x: torch.stack([x, x * 2], 2).sum(2),
    "repeated": lambda x: x.repeat(1, 2, 1, 2).repeat_interleave(2, 1),
    "chosen": lambda x: x[:, [2, 0]].movedim(1, -1).softmax(-1).unbind(-1),
    "written in part": lambda x: _written(x.clone()),
    "flipped": lambda x: x.flip(1).squeeze().roll(1, 3),
    "joined with what is whole": lambda x: torch.cat([x, torch.ones(2, 1, 16, 6)], 1),
    "cropped": lambda x: x[:, :, :14],
}
WHOLE: dict[str, Any] = {
    "rows joined": lambda x: torch.cat([x, x[:, :, -1:]], 2),
    "every second row": lambda x: x[:, :, ::2],
    "one row": lambda x: x[:, :, 3] + x[:, :, 5],
    "rows turned": lambda x: x.flip(2),
    "rolled through all": lambda x: x.roll(1),
    "unfolded": lambda x: x.unfold(1, 2, 2),
    "first rows": lambda x: x[:, :, :2],
    "rows among others": lambda x: x.view(2, 4, 2, 8, 6) * 2,
    "drawn": lambda x: torch.randn_like(x) * 0 + x.sum(),
    "sorted rows": lambda x: x.sort(2)[0],
}


def _written(x: Tensor) -> Tensor:
    x[:, 1] = x[:, 0] * 2
    x[..., 2:4].add_(1)
    x.view(2, 4, -1)[:, 0].mul_(3)
    return x.mul_(2)


def every(names: list[str]) -> dict[str, tuple[float, bool]]:
    return {name: compared((VIEWS | WHOLE)[name], picture(), 2) for name in names}


def test_views_keep_rows_on_their_ranks() -> None:
    for found in run_ranks(3, every, list(VIEWS)):
        assert {name: far for name, (far, _) in found.items() if far > 1e-6} == {}
        assert [name for name, (_, is_split) in found.items() if not is_split] == []


def test_what_mixes_rows_is_right_nevertheless_and_counted() -> None:
    for found in run_ranks(3, every, list(WHOLE)):
        assert {name: far for name, (far, _) in found.items() if far > 1e-6} == {}
        assert [name for name, (_, is_split) in found.items() if is_split] == []

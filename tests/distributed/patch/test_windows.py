"""What reads neighbouring rows, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.patch.pieces import compared, draw, picture
from tests.ranks import run_ranks

CONVOLUTIONS = {
    "same": {"kernel_size": 3, "padding": 1},
    "wide": {"kernel_size": 7, "padding": 3},
    "dilated": {"kernel_size": 3, "padding": 4, "dilation": 4},
    "halved": {"kernel_size": 3, "stride": 2, "padding": 1},
    "halved by four": {"kernel_size": 4, "stride": 2, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "unpadded": {"kernel_size": 3},
    "groups": {"kernel_size": 5, "padding": 2, "groups": 4},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicated": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "as large": {"kernel_size": 3, "padding": "same"},
}
TRANSPOSED = {
    "doubled": {"kernel_size": 4, "stride": 2, "padding": 1},
    "doubled by two": {"kernel_size": 2, "stride": 2},
    "doubled by three": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "not grown": {"kernel_size": 3, "padding": 1},
}
KINDS: dict[int, tuple[Any, Any]] = {
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d),
    5: (nn.Conv3d, nn.ConvTranspose3d),
}
OTHERS: dict[str, Any] = {
    "explicit padding": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), draw(3, 4, 3, 3), stride=2),
    "padding around": lambda x: F.pad(x, (1, 1, 2, 1), value=3.0) * 2,
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "exact": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
    "to a size": lambda x: F.interpolate(x, size=(32, 6)),
    "blended elsewhere": lambda x: F.interpolate(x, size=(16, 12), mode="bilinear"),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "unshuffled": lambda x: F.pixel_unshuffle(x, 2),
    "pooled": lambda x: F.avg_pool2d(x, 2),
    "twice": lambda x: (
        F.conv2d(F.conv2d(x, draw(4, 4, 3, 3), padding=1), draw(3, 4, 3, 3, seed=2), padding=1) + x[:, :3]
    ),
}
WHOLE: dict[str, Any] = {
    "blended": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "halved by nearest": lambda x: F.interpolate(x, scale_factor=0.5),
    "pooled with padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "fewer rows than ranks": lambda x: F.conv2d(x, draw(3, 4, 6, 3), stride=8),
    "reflected far": lambda x: F.pad(x, (0, 0, 7, 7), mode="reflect"),
}


def layer(kind: Any, options: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        built: nn.Module = kind(4, 4, **options)
    return built


def convolved(num_dims: int, dim: int) -> dict[str, tuple[float, bool]]:
    plain, transposed = KINDS[num_dims]
    layers = {name: layer(plain, options) for name, options in CONVOLUTIONS.items()}
    layers |= {name: layer(transposed, options) for name, options in TRANSPOSED.items()}
    return {name: compared(built, picture(num_dims, dim), dim) for name, built in layers.items()}


@pytest.mark.parametrize(("num_dims", "dim", "num_ranks"), [(3, 2, 3), (4, 2, 4), (4, 3, 2), (5, 3, 3)])
def test_convolutions_read_their_neighbours_rows(num_dims: int, dim: int, num_ranks: int) -> None:
    for found in run_ranks(num_ranks, convolved, num_dims, dim):
        assert {name: far for name, (far, _) in found.items() if far > 2e-6} == {}
        assert [name for name, (_, is_split) in found.items() if not is_split] == []


def every(names: list[str]) -> dict[str, tuple[float, bool]]:
    return {name: compared((OTHERS | WHOLE)[name], picture(), 2) for name in names}


def test_padding_and_growing_go_by_rows() -> None:
    for found in run_ranks(3, every, list(OTHERS)):
        assert {name: far for name, (far, _) in found.items() if far > 2e-6} == {}
        assert [name for name, (_, is_split) in found.items() if not is_split] == []


def test_what_cannot_go_by_rows_is_right_nevertheless() -> None:
    for found in run_ranks(3, every, list(WHOLE)):
        assert {name: far for name, (far, _) in found.items() if far > 2e-6} == {}
        assert [name for name, (_, is_split) in found.items() if is_split] == []


def along_frames(x: Tensor) -> Tensor:
    return F.conv1d(x.permute(0, 4, 3, 1, 2).flatten(0, 2), draw(4, 4, 3), padding=1)


def in_the_batch() -> tuple[float, bool]:
    return compared(along_frames, picture(5, 3), 3)


def test_the_batch_of_a_convolution_may_hold_the_rows() -> None:
    for far, is_split in run_ranks(2, in_the_batch):
        assert far < 2e-6 and is_split

"""What the tests of stages share: denoisers, whole and in stages, and toys to deal out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from penstock.models.rows.row import Row, StackRow
from penstock.models.rows.table import row_of


def row_for(denoiser: nn.Module) -> Row:
    found = row_of(denoiser)
    assert found is not None
    return found


def stages(size: int) -> Group:
    group = build_mesh(ParallelConfig(pipeline_parallel_size=size), "cpu")["pipeline"]
    group.traffic.clear()
    return group


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in flat(part)]


def forward(denoiser: nn.Module, inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    with torch.inference_mode():
        return flat(denoiser(**inputs, **more))


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def num_bytes(modules: Any) -> int:
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def hold(block: nn.Module) -> bool:
    return True


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)
        self.scale = 3.0

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        return hidden_states + self.linear(hidden_states)


class Denoiser(nn.Module):
    """Blocks after blocks; `is_keeping` adds what the first block gave to what the last one gives."""

    def __init__(self, *widths: int, num_refiners: int = 0, is_keeping: bool = False) -> None:
        super().__init__()
        self.refiners = nn.ModuleList([Block() for _ in range(num_refiners)])
        self.blocks = nn.ModuleList([Block(width) for width in widths])
        self.is_keeping = is_keeping

    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            kept.append(hidden_states * block.scale)
        return hidden_states + kept[0] if self.is_keeping else hidden_states


REFINERS = StackRow("refiners", takes={"hidden_states": "txt"}, gives=("txt",))
BLOCKS = StackRow("blocks", takes={"hidden_states": "img", "temb": "img"}, gives=("img",))
ROW = Row(stacks=(REFINERS, BLOCKS), attention={})

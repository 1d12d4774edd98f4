"""One denoiser, plain and split over ranks: what the tests of every split share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh, build_mesh
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.errors import PenstockError
from penstock.models.rows.row import Row, StackRow
from tests.tolerance import difference, tolerance_of
from tests.zoo import denoisers
from tests.zoo.denoisers import others

CASES = {**denoisers.CASES, **{case.name: case for case in others.CASES}}

Degrees = tuple[int, int]
"""(ulysses, ring)."""


@cache
def mesh_of(ulysses: int, ring: int) -> Mesh:
    """The mesh of all ranks, built once."""
    return build_mesh(ParallelConfig(ulysses_degree=ulysses, ring_degree=ring), "cpu")


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in a denoiser's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output or () for tensor in tensors_of(part)]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The inputs of a denoiser in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)([cast(part, dtype) for part in value])
    return {key: cast(part, dtype) for key, part in value.items()} if isinstance(value, dict) else value


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """A forward as pipelines do it."""
    with torch.inference_mode():
        return tensors_of(model(**inputs))


@contextmanager
def without_exchange() -> Iterator[None]:
    """Ranks that keep to themselves what attention would send."""
    kept = Group.all_to_all, Group.shift
    Group.all_to_all, Group.shift = lambda group, tensor: tensor, lambda group, tensor: (tensor, ())
    try:
        yield
    finally:
        Group.all_to_all, Group.shift = kept


def same(row: Row) -> Row:
    """The row as it is."""
    return row


def compare(
    name: str,
    degrees: Sequence[Degrees],
    sizes: Sequence[str],
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Row], Row] = same,
    more: Callable[[str], dict[str, Any]] = lambda size: {},
) -> dict[tuple[Degrees, str], tuple[float, float, float]]:
    """On every rank: how far the split denoiser is from the plain one, how far where attention exchanges nothing, and
    how far it may be.

    Args:
        name: of the case.
        degrees: one after another; the ranks are their product.
        sizes: of the inputs.
        heads: of attention.
        dtype: of weights and inputs.
        change: makes another row of that of the class.
        more: arguments of the forward besides those of the case, by size.
    """
    case = CASES[name]
    model = case.build(heads=heads)
    model = model if dtype == torch.float32 else model.to(dtype)
    row = change(check_sequence(model, ParallelConfig()))

    def forward(size: str) -> list[torch.Tensor]:
        return run(model, cast({**case.inputs(size), **more(size)}, dtype))

    plain = {size: forward(size) for size in sizes}
    allowed = {size: tolerance_of(model, lambda size=size: forward(size), plain[size]) for size in sizes}
    measured = {}
    for pair in degrees:
        undo = apply_sequence(model, row, mesh_of(*pair))
        split = {size: forward(size) for size in sizes}
        with without_exchange():
            local = {size: forward(size) for size in sizes}
        undo.run()
        for size in sizes:
            far = difference(split[size], plain[size]), difference(local[size], plain[size])
            measured[pair, size] = (*far, allowed[size])
    assert difference(forward(sizes[0]), plain[sizes[0]]) == 0
    return measured


def whole_text(row: Row) -> Row:
    """The row with text that is whole on every rank."""
    return replace(row, whole=("txt",))


def nothing_whole(row: Row) -> Row:
    """The row with all streams cut."""
    return replace(row, whole=())


def apart(row: Row) -> Row:
    """The row with streams that are gathered after every block."""
    return replace(row, stacks=tuple(replace(stack, is_apart=True) for stack in row.stacks), ends={})


def without_masks(row: Row) -> Row:
    """The row that does not know what a block's mask means."""
    return replace(row, masks="")


def residuals(size: str, names: Sequence[str] = ("controlnet_block_samples",)) -> dict[str, Any]:
    """What a ControlNet adds to the tokens of Flux and its kin, behind every block."""
    tokens = denoisers.SIZES[size].tokens
    return {name: list(denoisers.case.noise(name, 2, 2, tokens, 64)) for name in names}


def both_residuals(size: str) -> dict[str, Any]:
    """What a ControlNet adds behind the blocks of both stacks."""
    return residuals(size, ("controlnet_block_samples", "controlnet_single_block_samples"))


def block_residuals(size: str) -> dict[str, Any]:
    """What a ControlNet adds to the tokens of Stable Diffusion 3."""
    return {"block_controlnet_hidden_states": residuals(size)["controlnet_block_samples"]}


def layer_residuals(size: str) -> dict[str, Any]:
    """What a ControlNet adds to text and picture of Z-Image, behind its first and last layer."""
    tokens = 96  # picture and text, each filled up to a multiple of 32
    return {"controlnet_block_samples": {layer: denoisers.case.noise(str(layer), 2, tokens, 1) for layer in (0, 2)}}


def pixel_mask(size: str) -> dict[str, Any]:
    """A mask of the picture's tokens: the second one ends early."""
    tokens = denoisers.SIZES[size].tokens
    return {"attention_mask": torch.arange(tokens) < torch.tensor([[tokens], [tokens - 11]])}


def voxel_mask(size: str) -> dict[str, Any]:
    """A mask of the pixels of every frame: the second video ends early."""
    frames, height, width = denoisers.SIZES[size].video
    mask = torch.ones(2, frames, 2 * height, 2 * width)
    mask[1, -1] = 0
    return {"attention_mask": mask}


def error_of(
    name: str, degrees: Degrees, more: dict[str, Any], change: Callable[[Row], Row] = same, size: str = "odd"
) -> str:
    """What a split denoiser says to a call; the plain one takes it, before and after."""
    case = CASES[name]
    model = case.build()
    expected = run(model, {**case.inputs(size), **more})
    undo = apply_sequence(model, change(check_sequence(model, ParallelConfig())), mesh_of(*degrees))
    said = ""
    try:
        run(model, {**case.inputs(size), **more})
    except PenstockError as error:
        said = str(error)
    undo.run()
    assert difference(run(model, {**case.inputs(size), **more}), expected) == 0
    return said


def traffic(name: str, degrees: Degrees, heads: int = 4) -> dict[str, tuple[int, int]]:
    """Calls and bytes received from others in one forward of even size, by group and operation."""
    case, mesh = CASES[name], mesh_of(*degrees)
    model = case.build(heads=heads)
    undo = apply_sequence(model, check_sequence(model, ParallelConfig()), mesh)
    groups = {axis: mesh[axis] for axis in ("sequence", "ulysses", "ring")}
    for group in groups.values():
        group.traffic.clear()
    run(model, case.inputs("even"))
    undo.run()
    return {
        f"{axis} {operation}": (calls, group.traffic.received_bytes[operation])
        for axis, group in groups.items()
        for operation, calls in group.traffic.num_calls.items()
    }


class Attends(nn.Module):
    """Attention without weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = hidden_states[:, None]
        return F.scaled_dot_product_attention(heads, heads, heads)[:, 0]


class Block(nn.Module):
    """A block that attends."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attends()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn(hidden_states)


class ByKeyword(nn.Module):
    """A denoiser that calls its modules by keyword."""

    _sequence_row = Row(
        stacks=(StackRow("blocks", {"hidden_states": "img"}, ("img",)),),
        attention={"attn": "img"},
        between={"middle": "img"},
        ends={"head": "img"},
    )

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.middle = nn.Softmax(1)
        self.head = nn.Softmax(1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        first, last = self.blocks
        hidden_states = self.middle(input=first(hidden_states=hidden_states))
        return self.head(input=last(hidden_states=hidden_states))

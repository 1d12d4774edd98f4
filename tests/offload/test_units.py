"""The partition into units: every weight in exactly one, what shares memory together, odd strides as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penstock.errors import ConfigError
from penstock.models.components import Component
from penstock.offload.units import Partition, Unit, take_apart
from penstock.profile import Fact, Role
from penstock.weights.layout import packed, paged
from penstock.weights.memory import HostMemory
from penstock.weights.ranges import FileRange, Range, Unread
from penstock.weights.reader import FileReader
from penstock.weights.sources import source_of
from tests.models import toys


def component(module: nn.Module, name: str = "transformer", role: Role = "denoiser") -> Component:
    return Component(name, module, role, Fact(origin="structure", detail="a test"))


def apart(*components: Component | nn.Module, locate: Any = lambda *_: None, **options: Any) -> Partition:
    found = [part if isinstance(part, Component) else component(part) for part in components]
    return take_apart(found, locate, options.pop("is_layerwise", True), **options)


def names(unit: Unit | None) -> list[str]:
    assert unit is not None
    return sorted(weight.name for weight in unit.weights)


def filled(unit: Unit, layout_of: Callable[..., Any] = paged) -> dict[str, torch.Tensor]:
    """What a unit's weights are once its source has filled its memory."""
    layout = layout_of(unit.pieces)
    memory = HostMemory(layout.num_bytes)
    for part in source_of(unit.pieces, layout, FileReader()).parts:
        part.write(memory.view[part.position : part.position + part.num_bytes])
    return {weight.name: weight.view(memory.tensor, layout.positions[weight.piece]) for weight in unit.weights}


def test_blocks_of_all_stacks_are_units_and_the_rest_is_one() -> None:
    part = apart(toys.Denoiser()).components[0]
    assert [unit.name for unit in part.units] == [
        "transformer (rest)",
        *(f"transformer.blocks.{number}" for number in range(3)),
        *(f"transformer.single_blocks.{number}" for number in range(2)),
    ]
    assert names(part.rest) == ["transformer.head.bias", "transformer.head.weight", "transformer.scale"]
    assert names(part.blocks[1]) == ["transformer.blocks.1.linear.weight"]


@pytest.mark.parametrize(
    ("role", "is_layerwise"), [("denoiser", False), ("vae", True), ("resident", True)], ids=["mode", "vae", "resident"]
)
def test_other_modes_and_roles_move_whole_components(role: Role, is_layerwise: bool) -> None:
    partition = apart(component(toys.Denoiser(), role=role), is_layerwise=is_layerwise)
    assert [unit.name for unit in partition.units] == ["transformer"]
    assert len(partition.units[0].weights) == 8


def test_a_module_inside_another_belongs_to_the_inner_component() -> None:
    outer = nn.ModuleDict({"inner": toys.Denoiser(), "own": nn.Linear(4, 4)})
    partition = apart(component(outer, "outer", "encoder"), component(outer["inner"], "outer.inner"))
    assert [part.name for part in partition.components] == ["outer", "outer.inner"]
    assert names(partition.components[0].rest) == ["outer.own.bias", "outer.own.weight"]
    assert len(partition.components[1].blocks) == 5


def test_weights_tied_within_a_unit_are_one_piece() -> None:
    model = toys.Denoiser()
    model.blocks[0].other = model.blocks[0].linear.weight
    unit = apart(model).components[0].blocks[0]
    assert len(unit.weights) == 2 and len(unit.pieces) == 1
    first, second = filled(unit).values()
    assert first.data_ptr() == second.data_ptr()


def test_weights_tied_across_blocks_go_to_the_rest() -> None:
    model = toys.Denoiser()
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    part = apart(model).components[0]
    assert {"transformer.blocks.0.linear.weight", "transformer.blocks.2.linear.weight"} < set(names(part.rest))
    assert [unit.name for unit in part.blocks] == [
        "transformer.blocks.1",
        "transformer.single_blocks.0",
        "transformer.single_blocks.1",
    ]
    assert part.rest is not None and len(part.rest.pieces) == len(part.rest.weights) - 1


def test_weights_tied_across_components_are_shared() -> None:
    model, encoder = toys.Denoiser(), toys.Encoder()
    encoder.layers[0].linear.weight = model.head.weight
    partition = apart(model, component(encoder, "encoder", "encoder"))
    assert names(partition.shared) == ["encoder.layers.0.linear.weight", "transformer.head.weight"]
    assert partition.shared is not None and len(partition.shared.pieces) == 1
    assert partition.units[-1] is partition.shared
    assert "transformer.head.weight" not in names(partition.components[0].rest)


def test_a_component_that_is_registered_twice_is_taken_once() -> None:
    model = toys.Denoiser()
    first, second = apart(model, component(model, "again")).components
    assert len(first.units) == 6 and second.units == []


def test_views_of_one_storage_stay_views_of_one() -> None:
    flat = torch.arange(32.0)
    model = toys.Denoiser()
    model.a, model.b = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[12:])
    model.c, model.inside = nn.Parameter(torch.arange(3.0)), nn.Parameter(flat[2:4])
    unit = apart(model).components[0].rest
    assert unit is not None and len(unit.pieces) == 5  # head.weight, head.bias, scale, c, and the shared one
    views = filled(unit)
    a, b = views["transformer.a"], views["transformer.b"]
    assert torch.equal(a, flat[:20].view(4, 5)) and torch.equal(b, flat[12:])
    assert b.data_ptr() - a.data_ptr() == 12 * 4


ODD = {
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "strided": torch.arange(24.0).reshape(4, 6)[::2, 1::3],
    "channels last": torch.arange(36.0).reshape(1, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    "expanded": torch.arange(3.0)[:, None].expand(3, 5),
    "0-dim": torch.tensor(7.0),
    "with an offset": torch.arange(9, dtype=torch.float16)[3:],
    "integer": torch.arange(6).view(2, 3),
    "bool": torch.tensor([True, False, True]),
    "complex": torch.arange(4.0).to(torch.complex64),
}


@pytest.mark.parametrize("layout_of", [paged, packed])
@pytest.mark.parametrize("name", ODD)
def test_odd_weights_keep_values_shape_and_strides(name: str, layout_of: Callable[..., Any]) -> None:
    model = nn.Module()
    model.odd = nn.Parameter(ODD[name], requires_grad=False)
    model.even = nn.Parameter(torch.ones(5))
    unit = apart(component(model, role="vae")).units[0]
    view = filled(unit, layout_of)["transformer.odd"]
    assert torch.equal(view, ODD[name])
    assert (view.dtype, view.stride()) == (ODD[name].dtype, ODD[name].stride())


def test_what_has_no_elements_stays_outside_of_units() -> None:
    model = toys.Denoiser()
    model.blocks[0].empty = nn.Parameter(torch.empty(0, 4))
    model.only_empty = nn.Parameter(torch.empty(0))
    partition = apart(model)
    assert sorted(weight.name for weight in partition.fixed) == [
        "transformer.blocks.0.empty",
        "transformer.only_empty",
        "transformer.table",
    ]
    assert partition.fixed_bytes == 4 * 8


def test_buffers_stream_where_they_are_stored_and_stay_where_they_are_not() -> None:
    model = toys.Denoiser()
    model.blocks[0].register_buffer("stored", torch.ones(4))

    def locate(name: str, tensor: torch.Tensor, num_bytes: int) -> Range | None:
        return FileRange(Path("file"), 0, num_bytes) if name.endswith("stored") else None

    partition = apart(model, locate=locate)
    assert "transformer.blocks.0.stored" in names(partition.components[0].blocks[0])
    assert [weight.name for weight in partition.fixed] == ["transformer.table"]


def test_fixed_bytes_count_a_tensor_once() -> None:
    model = toys.Denoiser()
    model.blocks[0].register_buffer("mine", model.table)
    assert len(apart(model).fixed) == 2 and apart(model).fixed_bytes == 4 * 8


def test_weights_without_memory_can_be_planned_with() -> None:
    with torch.device("meta"):
        model = toys.Denoiser()
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    unit = apart(model).components[0].rest
    assert unit is not None and len(unit.weights) == 5 and len(unit.pieces) == 4
    assert all(isinstance(piece.range, Unread) for piece in unit.pieces)
    assert sum(piece.num_bytes for piece in unit.pieces) == 4 * (16 + 16 + 4 + 4)


class Subclass(torch.Tensor):
    """A tensor of a library that quantises."""


def _sparse(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.eye(4).to_sparse())


def _subclass(model: Any) -> None:
    model.head._parameters["weight"] = torch.eye(4).as_subclass(Subclass)


def _lazy(model: Any) -> None:
    model.register_buffer("lazy", torch.ones(3, dtype=torch.complex64).conj())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_sparse, "1 weights cannot be streamed: transformer.head.weight (sparse_coo)"),
        (_subclass, "transformer.head.weight (Subclass)"),
        (_lazy, "transformer.lazy (a conjugate or negative that was never computed)"),
    ],
)
def test_kinds_that_cannot_stream_are_named(spoil: Callable[[Any], None], message: str) -> None:
    model = toys.Denoiser()
    spoil(model)
    with pytest.raises(ConfigError) as caught:
        apart(model)
    assert message in str(caught.value) and "offload='none'" in str(caught.value)


def test_weights_that_are_on_another_device_are_named_and_only_a_few_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 1))
    with pytest.raises(ConfigError, match=r"^9 weights .*blocks.0.linear.weight \(already on cuda:1\).* and 4 more\."):
        apart(toys.Denoiser())


def test_what_shares_memory_is_cast_together_or_not_at_all() -> None:
    model = toys.Denoiser()
    model.tied = model.head.weight
    wanted = {id(model.head.weight): torch.bfloat16}
    unit = apart(model, dtypes=wanted).components[0].rest
    assert unit is not None
    views = filled(unit)
    assert torch.equal(views["transformer.tied"], model.head.weight.to(torch.bfloat16))
    assert views["transformer.tied"].data_ptr() == views["transformer.head.weight"].data_ptr()
    model.part = nn.Parameter(model.head.weight.detach()[:2])  # another tensor on the same memory, not to be cast
    with pytest.raises(ConfigError, match="transformer.head.weight.* share memory"):
        apart(model, dtypes=wanted)


def test_views_of_one_storage_are_cast_to_views_of_one() -> None:
    flat = torch.arange(16.0)
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:12]), nn.Parameter(flat[8:])
    wanted = {id(model.a): torch.float64, id(model.b): torch.float64}
    views = filled(apart(component(model, role="vae"), dtypes=wanted).units[0])
    assert torch.equal(views["transformer.b"], flat[8:].double())
    assert views["transformer.b"].data_ptr() - views["transformer.a"].data_ptr() == 8 * 8

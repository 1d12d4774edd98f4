"""What is gathered as one: repeated blocks and named modules, and nothing by accident of a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.distributed.hsdp.config import ShardingError
from penstock.distributed.hsdp.units import ignored_parameters, outside_parameters, units_of
from penstock.errors import DeclarationError
from penstock.models.stacks import find_stacks
from tests.distributed.hsdp.toys import Block, Toy, toy
from tests.distributed.sequences import CASES
from tests.zoo import encoders, tokenizers

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def is_numbered(name: str, module: nn.Module) -> bool:
    """What matches 912 modules of LTX-2 where it means its 48 blocks."""
    return name.rpartition(".")[2].isdigit()


def declared(*conditions: Any, ignored: tuple[str, ...] = ()) -> Toy:
    kind = type(
        "Declared", (Toy,), {"_hsdp_shard_conditions": list(conditions), "_hsdp_ignored_modules": list(ignored)}
    )
    return toy(kind=kind)


def test_blocks_of_stacks_are_the_units_where_nothing_is_declared() -> None:
    assert list(units_of(toy())) == BLOCKS


def test_numbers_within_blocks_and_sequences_are_no_units() -> None:
    model = declared(is_numbered)
    matched = [name for name, module in model.named_modules() if is_numbered(name, module)]
    assert {"blocks.0.to_out.0", "blocks.2.to_out.1", "head.0"} < set(matched)  # what a naive rule takes
    assert list(units_of(model)) == BLOCKS


def test_the_numbered_modules_of_ltx2_are_its_blocks() -> None:
    def condition(name: str, module: nn.Module) -> bool:
        return "transformer_blocks" in name and is_numbered(name, module)

    model = CASES["ltx2"].build()
    blocks = len(model.transformer_blocks)
    model.__class__ = type("Declared", (type(model),), {"_hsdp_shard_conditions": [condition]})
    matched = [name for name, module in model.named_modules() if condition(name, module)]
    assert len(matched) > 5 * blocks
    assert list(units_of(model)) == [f"transformer_blocks.{number}" for number in range(blocks)]


def test_named_modules_are_units_beside_blocks() -> None:
    model = declared(is_numbered, lambda name, module: name == "embed")
    assert list(units_of(model)) == ["embed", *BLOCKS]


def test_the_outermost_of_matching_modules_is_the_unit() -> None:
    assert list(units_of(declared(lambda name, module: "blocks" in name))) == BLOCKS
    assert list(units_of(declared(lambda name, module: name.endswith("to_in")))) == [f"{name}.to_in" for name in BLOCKS]


def test_a_condition_on_classes_will_do() -> None:
    assert list(units_of(declared(lambda name, module: isinstance(module, Block)))) == BLOCKS


def test_a_single_function_will_do() -> None:
    kind = type("Declared", (Toy,), {"_hsdp_shard_conditions": (is_numbered,)})
    assert list(units_of(toy(kind=kind))) == BLOCKS


def test_ignored_modules_are_no_units_and_hold_none() -> None:
    model = declared(is_numbered, ignored=("blocks.1", "head"))
    assert list(units_of(model)) == ["blocks.0", "blocks.2"]
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ignored_parameters(model)}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(("blocks.1.", "head."))}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (toy(num_blocks=0), "Toy has 0 units: no list of blocks was found"),
        (declared(lambda name, module: False), "1 _hsdp_shard_conditions match 0 modules. A unit is"),
        (declared(lambda name, module: ".to_out." in name), "match 6 modules, such as 'blocks.0.to_out.0', which lie"),
        (declared(is_numbered, ignored=("blocks",)), "0 units"),
    ],
)
def test_a_model_without_units_is_refused(model: Toy, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        units_of(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (declared("blocks"), "holds 'blocks', not a function"),
        (declared(is_numbered, ignored=("tail",)), "declares 'tail', but itself"),
        (declared(is_numbered, ignored=("embed.weight",)), "names 'embed.weight', a Parameter and no module"),
    ],
)
def test_declarations_that_are_not_true_are_refused(model: Toy, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        units_of(model)


def test_a_declared_stack_of_lists_is_refused() -> None:
    class Pairs(nn.Module):
        _layerwise_offload_blocks_attrs = ("pairs",)

        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    with pytest.raises(DeclarationError, match="pairs.0 is a unit and a ModuleList, which has no forward"):
        units_of(Pairs())


@pytest.mark.parametrize("name", CASES)
def test_units_of_every_denoiser_are_its_blocks(name: str) -> None:
    model = CASES[name].build()
    paths = [f"{stack}.{number}" for stack in CASES[name].stacks for number in range(len(model.get_submodule(stack)))]
    more = [f"{stack.path}.{number}" for stack in find_stacks(model) for number in range(len(stack.blocks))]
    assert set(paths) <= set(more)
    units = units_of(model)
    assert set(units) == set(more)
    assert not [name for name in units if any(name.startswith(f"{other}.") for other in units)]


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: encoders.t5(tokenizers.t5()), ["encoder.block.0", "encoder.block.1"]),
        (lambda: encoders.clip(tokenizers.clip()), [f"encoder.layers.{number}" for number in range(3)]),
        (lambda: encoders.qwen25_vl_text(tokenizers.qwen2()), [f"layers.{number}" for number in range(3)]),
    ],
)
def test_units_of_text_encoders_are_their_layers(make: Any, blocks: list[str]) -> None:
    units = list(units_of(make()))
    assert [name.removeprefix("text_model.") for name in units] == blocks


def test_what_a_denoiser_reads_from_within_its_blocks() -> None:
    model = CASES["dit"].build()
    names = {name for name, parameter in model.named_parameters() if id(parameter) in outside_parameters(model)}
    assert names == {name for name, _ in model.named_parameters() if name.startswith("transformer_blocks.0.norm1.emb.")}
    assert names
    assert not outside_parameters(torch.nn.Linear(2, 2))

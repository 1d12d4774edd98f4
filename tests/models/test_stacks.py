"""Stacks: what is declared, what diffusers says, what structure shows."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from penstock.errors import DeclarationError
from penstock.models.stacks import find_stacks
from tests import zoo
from tests.models.toys import Block, Denoiser, OtherBlock


def shape(module: nn.Module) -> dict[str, tuple[int, str]]:
    return {stack.path: (len(stack.blocks), type(stack.blocks[0]).__name__) for stack in find_stacks(module)}


def test_structure_finds_both_stacks() -> None:
    assert shape(Denoiser()) == {"blocks": (3, "Block"), "single_blocks": (2, "OtherBlock")}
    assert {stack.fact.origin for stack in find_stacks(Denoiser())} == {"structure"}


def test_declared_stacks_in_the_declared_order() -> None:
    class Declared(Denoiser):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = ["single_blocks", "blocks"]

    assert list(shape(Declared())) == ["single_blocks", "blocks"]
    assert find_stacks(Declared())[0].fact.detail == "Declared._layerwise_offload_blocks_attrs"


def test_single_attribute_still_works_and_is_deprecated() -> None:
    class Old(Denoiser):
        _layerwise_offload_blocks_attr = "blocks"

    with pytest.warns(DeprecationWarning, match="declare _layerwise_offload_blocks_attrs = \\['blocks'\\] instead"):
        stacks = find_stacks(Old())
    assert [stack.path for stack in stacks] == ["blocks"]


def test_a_stack_declared_twice_counts_once() -> None:
    class Twice(Denoiser):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = ["blocks", "blocks"]

    assert list(shape(Twice())) == ["blocks"]


def test_dictionary_of_blocks() -> None:
    class Keyed(Denoiser):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = ["table_of_blocks"]

        def __init__(self) -> None:
            super().__init__()
            self.table_of_blocks = nn.ModuleDict({"a": Block(), "b": Block()})

    assert shape(Keyed()) == {"table_of_blocks": (2, "Block")}


def test_structure_completes_metadata() -> None:
    class Listed(Denoiser):
        _repeated_blocks: ClassVar[list[str]] = ["OtherBlock"]

    origins = {stack.path: stack.fact.origin for stack in find_stacks(Listed())}
    assert origins == {"blocks": "structure", "single_blocks": "diffusers"}


def test_declared_dotted_path() -> None:
    class Wrapper(nn.Module):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = ["inner.blocks"]

        def __init__(self) -> None:
            super().__init__()
            self.inner = Denoiser()

    assert shape(Wrapper()) == {"inner.blocks": (3, "Block")}


def test_module_that_is_no_list_is_one_block() -> None:
    class Single(Denoiser):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = ["head"]

    assert shape(Single()) == {"head": (1, "Linear")}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "has no 'missing'"),
        ("scale", "the stack 'scale', a Parameter"),
        ("nothing", "which is empty"),
        ("numbers", "which holds a int"),
    ],
)
def test_wrong_declarations_are_errors(path: str, message: str) -> None:
    class Wrong(Denoiser):
        _layerwise_offload_blocks_attrs: ClassVar[list[str]] = [path]

        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.ModuleList()
            self.numbers = [1, 2]

    with pytest.raises(DeclarationError, match=message):
        find_stacks(Wrong())


@pytest.mark.parametrize(
    ("name", "component", "expected"),
    [
        ("flux", "transformer", ["transformer_blocks", "single_transformer_blocks"]),
        ("flux", "text_encoder_2", ["encoder.block"]),
        ("z_image", "transformer", ["noise_refiner", "context_refiner", "layers"]),
        ("wan22", "transformer_2", ["blocks"]),
        ("stranger", "painter", ["layers_of_stone", "towers.0", "towers.1"]),
    ],
)
def test_stock_classes(name: str, component: str, expected: list[str]) -> None:
    module = getattr(zoo.build(name), component)
    stacks = {stack.path: stack.blocks for stack in find_stacks(module)}
    assert list(stacks) == expected
    for path, blocks in stacks.items():
        assert blocks == tuple(module.get_submodule(path))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_no_block_is_inside_another(name: str) -> None:
    for part in zoo.build(name).components.values():
        if isinstance(part, nn.Module):
            blocks = [block for stack in find_stacks(part) for block in stack.blocks]
            inside: list[Any] = [inner for block in blocks for inner in block.modules() if inner is not block]
            assert not {id(block) for block in blocks} & {id(inner) for inner in inside}


def test_small_lists_are_no_stacks() -> None:
    class Mostly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(64) for _ in range(2))
            self.heads = nn.ModuleList(OtherBlock(2) for _ in range(2))
            self.table = nn.Parameter(torch.zeros(1))

    assert list(shape(Mostly())) == ["blocks"]

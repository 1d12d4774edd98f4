"""Which weights become shards, which stay whole, and which are cast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from penstock.distributed.hsdp.config import ShardingError
from penstock.distributed.hsdp.units import units_of
from penstock.distributed.hsdp.weights import Sorting, cast_weights, move_whole, sort_weights
from penstock.models.dtypes import target_dtypes
from tests.distributed.hsdp.toys import WIDTH, Block, Toy, toy
from tests.distributed.sequences import CASES
from tests.zoo import encoders, tokenizers


class Packed(nn.Parameter):
    """As the libraries of packed weights have one."""


class Odd(Block):
    """A block with one weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.table = nn.Parameter(torch.ones(1, WIDTH))
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.small = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.turned = nn.Parameter(torch.ones(4, 6).t())
        self.packed = Packed(torch.ones(4, 4))
        self.third = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))


class Kept(Toy):
    """A model that keeps some modules in float32, and others whole."""

    _keep_in_fp32_modules = ("to_in",)
    _hsdp_ignored_modules = ("head",)


def sort(model: nn.Module) -> Sorting:
    return sort_weights(model, units_of(model).values())


def test_weights_that_cannot_be_shards_stay_whole() -> None:
    sorting = sort(toy(Odd, kind=Kept))
    reasons = {name.removeprefix("blocks.0."): reason for name, (_, reason) in sorting.whole.items() if ".0." in name}
    assert {name: reason for name, reason in reasons.items() if not name.startswith("head.")} == {
        "scale": "it has no dimension",
        "table": "it has one row",
        "codes": "it is not floating",
        "small": "it is packed",
        "turned": "it is not contiguous",
        "packed": "it is packed",
    }
    assert reasons["head.0.weight"] == "its module is ignored"
    assert {"embed.weight", "blocks.0.to_in.weight", "blocks.2.to_out.0.bias", "blocks.1.third"} < set(sorting.sharded)
    assert sorting.whole_bytes == 3 * (4 + 4 * WIDTH + 16 + 16 + 96 + 64) + 4 * (WIDTH + 1) * WIDTH + 4 * 5 * (
        WIDTH + 1
    )
    total = sum(parameter.nbytes for parameter in toy(Odd).parameters())
    assert sorting.sharded_bytes == total - sorting.whole_bytes


def test_a_weight_of_two_units_stays_whole_and_one_of_the_root_does_not() -> None:
    model = toy()
    model.blocks[1].to_in.weight = model.blocks[0].to_in.weight
    model.head[2].bias = model.embed.bias  # both outside of units
    model.head[0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    model.blocks[2].extra = model.head[0].weight
    sorting = sort(model)
    assert {name: reason for name, (_, reason) in sorting.whole.items()} == {
        "blocks.0.to_in.weight": "units share it",
        "blocks.2.extra": "units share it",
    }
    assert "embed.bias" in sorting.sharded


def test_what_the_denoiser_reads_itself_stays_whole() -> None:
    whole = sort(CASES["dit"].build()).whole
    reasons = {reason for name, (_, reason) in whole.items() if name.startswith("transformer_blocks.0.norm1.emb.")}
    assert reasons == {"it is used outside of its unit"}


def test_units_of_nothing_but_packed_weights_are_refused() -> None:
    model = toy()
    for block in model.blocks:
        for layer in (block.to_in, block.to_out[0]):
            for name, weight in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(weight.data.to(torch.int8), requires_grad=False))
    with pytest.raises(
        ShardingError, match=r"0 of the .* 3 units of Toy .*12 because it is not floating.*quantisation"
    ):
        sort(model)


def cast(model: nn.Module, dtype: torch.dtype | None) -> int:
    return cast_weights(model, sort(model), dtype)


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def test_only_weights_of_the_usual_dtype_are_cast() -> None:
    model = toy(Odd, kind=Kept)
    before = dtypes(model)
    bits = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    count = cast(model, torch.bfloat16)
    after = dtypes(model)
    changed = {name for name in after if after[name] != before[name]}
    assert count == len(changed)
    kept = {name for name in after if ".to_in." in name or name.startswith("head.")}
    third = {name for name in after if name.endswith(("codes", "small", "packed", "third"))}
    assert changed == set(after) - kept - third
    assert {after[name] for name in changed} == {torch.bfloat16}
    assert objects == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert all(torch.equal(model.get_parameter(name), bits[name].to(after[name])) for name in changed)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nothing_is_cast_where_the_model_has_the_dtype(dtype: torch.dtype | None) -> None:
    model = toy(Odd)
    before = dtypes(model)
    assert cast(model, dtype) == 0
    assert dtypes(model) == before


def test_islands_in_a_model_that_has_the_dtype_are_left() -> None:
    model = toy().to(torch.bfloat16)
    model.blocks[1].to_in.float()
    assert cast(model, torch.bfloat16) == 0
    assert model.blocks[1].to_in.weight.dtype == torch.float32


@pytest.mark.parametrize("make", [CASES["wan"].build, lambda: encoders.t5(tokenizers.t5()).eval()], ids=["wan", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_classes_of_the_libraries_get_the_dtypes_that_they_load_with(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = make()
    expected = target_dtypes(model, dtype)
    cast(model, dtype)
    found = dtypes(model)
    assert found == {name: expected[name] for name in found}
    if not (dtype == torch.bfloat16 and "shared.weight" in found):
        assert set(found.values()) == {dtype, torch.float32}  # neither is without islands


def test_packed_weights_that_are_elsewhere_are_refused_before_anything_moves() -> None:
    sorting = sort(toy(Odd))
    with pytest.raises(ShardingError, match=r"blocks.0.packed is a Tensor on cpu, and shards go to meta. Packed"):
        move_whole(sorting, torch.device("meta"))
    move_whole(sorting, torch.device("cpu"))  # where they are
    assert {parameter.device.type for parameter, _ in sorting.whole.values()} == {"cpu"}

"""Sharded models: the same outputs, a part of the bytes, and what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from penstock.distributed import HSDPInferenceConfig, apply_hsdp_to_model, get_fully_shard_world_size, shard_model
from penstock.distributed.hsdp import shards
from penstock.distributed.hsdp.config import ShardingError
from penstock.errors import PenstockError
from tests.distributed.hsdp.test_weights import Kept, Odd
from tests.distributed.hsdp.toys import Block, Toy, config, held_bytes, outputs, own_bytes, tokens, toy
from tests.ranks import run_ranks


def mesh(replicate: int = 1) -> Any:
    return shards.shard_mesh("cpu", replicate, dist.get_world_size() // replicate)


def uneven() -> Block:
    """A block of widths that neither 2 nor 4 divides: 7 and 14 rows."""
    return Block(7)


def mixed() -> Block:
    """A block in two dtypes."""
    block = Block()
    block.to_out[0].to(torch.bfloat16)
    block.to_out[0].forward = lambda tokens: nn.functional.linear(  # type: ignore[method-assign]
        tokens.to(torch.bfloat16), block.to_out[0].weight, block.to_out[0].bias
    ).float()
    return block


class Coded(Block):
    """A block whose output layer is integers with a scale."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.to_out[0].weight.data
        scale = weight.abs().amax() / 127
        codes = (weight / scale).round().to(torch.int8)
        self.to_out[0].weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale)  # without dimensions

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.to_out[0].weight.float() * self.scale
        return tokens + nn.functional.linear(torch.tanh(self.to_in(tokens)), weight, self.to_out[0].bias)


TOYS: dict[str, Callable[[], Toy]] = {
    "plain": toy,
    "uneven": lambda: toy(uneven, width=7),
    "mixed": lambda: toy(mixed),
    "coded": lambda: toy(Coded),
    "odd": lambda: toy(Odd, kind=Kept),
}


def parity(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What there is to know about a sharded toy, on this rank."""
    model = TOYS[name]()
    expected = outputs(model)
    before = {key: (parameter.shape, parameter.dtype) for key, parameter in model.named_parameters()}
    group = shards.shard_group(mesh(options.get("hsdp_replicate_size", 1)))
    sharded = apply_hsdp_to_model(model, config(**options))
    placed = {key: _place(parameter) for key, parameter in model.named_parameters()}
    calls = []
    for _ in range(3):
        group.traffic.clear()
        assert torch.equal(outputs(model), expected)
        calls.append(group.traffic.num_calls["all_gather"])
    after = {key: (parameter.shape, parameter.dtype) for key, parameter in model.named_parameters()}
    return {
        "same object": sharded is model and isinstance(model, Toy),
        "kept": after == before,
        "placed": placed,
        "stayed": placed == {key: _place(parameter) for key, parameter in model.named_parameters()},
        "frozen": not any(parameter.requires_grad for parameter in model.parameters()),
        "calls": calls,
        "size": get_fully_shard_world_size(),
        "group": group.ranks,
    }


def _place(parameter: nn.Parameter) -> Any:
    if not isinstance(parameter, DTensor):
        return None
    assert parameter.device_mesh.mesh_dim_names == ("replicate", "shard")
    return tuple(parameter.to_local().shape), parameter.device_mesh.mesh.tolist(), parameter.placements


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_toy_makes_the_same(name: str, ranks: int) -> None:
    for told in run_ranks(ranks, parity, name, {}):
        assert told["same object"] and told["kept"] and told["stayed"] and told["frozen"]
        assert told["calls"] == [5, 4, 4]  # three blocks and the root; the first forward asks for the second's first
        assert told["size"] == ranks
        placements = {place[2] for place in told["placed"].values() if place}
        assert placements == {(Replicate(), Shard(0))}


def test_copies_of_shard_groups() -> None:
    told = run_ranks(4, parity, "plain", {"hsdp_replicate_size": 2, "hsdp_shard_size": 2})
    assert [one["group"] for one in told] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    for one in told:
        assert one["size"] == 2 and one["kept"] and one["stayed"]
        shape, ranks, _ = one["placed"]["blocks.0.to_in.weight"]
        assert (shape, ranks) == ((48, 48), [[0, 1], [2, 3]])


def test_rows_that_no_number_of_ranks_divides() -> None:
    told = run_ranks(4, parity, "uneven", {})
    shapes = [one["placed"]["blocks.0.to_in.weight"][0] for one in told]
    assert shapes == [(4, 7), (4, 7), (4, 7), (2, 7)]
    assert [one["placed"]["embed.weight"][0][0] for one in told] == [2, 2, 2, 1]


def test_what_stays_whole_and_in_its_dtype() -> None:
    for told in run_ranks(2, parity, "odd", {}):
        whole = {name for name, place in told["placed"].items() if place is None}
        names = ("scale", "table", "codes", "small", "turned", "packed")
        heads = {f"head.{number}.{name}" for number in (0, 2) for name in ("weight", "bias")}
        assert whole == {f"blocks.{number}.{name}" for number in range(3) for name in names} | heads


def test_weights_that_are_not_freed_are_gathered_once() -> None:
    for told in run_ranks(2, parity, "plain", {"reshard_after_forward": False}):
        assert told["calls"] == [4, 0, 0]


def casts() -> tuple[set[torch.dtype], bool, torch.dtype, torch.dtype]:
    plain, model = toy(kind=Kept), toy(kind=Kept)
    for module in (plain.embed, *(block.to_out for block in plain.blocks)):
        module.to(torch.bfloat16)
    options = {"param_dtype": torch.bfloat16}
    apply_hsdp_to_model(model, config(**options))
    found = {parameter.dtype for name, parameter in model.named_parameters() if ".to_in." in name or "head" in name}
    with torch.no_grad():
        expected = steps(plain)
        same = torch.equal(steps(model), expected)
    other = toy(kind=Kept)
    apply_hsdp_to_model(other, config(output_dtype=torch.float16))
    return found, same, model.embed.weight.dtype, outputs(other).dtype


def steps(model: Toy) -> Tensor:
    """A forward whose layers are in two dtypes."""
    for block in model.blocks:
        block.to_out[0].register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype),))
    made: Tensor = model(tokens())
    return made


def test_a_cast_is_that_of_loading_and_spares_islands() -> None:
    for islands, same, dtype, out in run_ranks(2, casts):
        assert islands == {torch.float32}
        assert same
        assert (dtype, out) == (torch.bfloat16, torch.float16)


def modes() -> bool:
    """The same model in inference mode and out of it."""
    model = toy(mixed)
    expected = outputs(model)
    apply_hsdp_to_model(model, config())
    same = True
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            same = same and torch.equal(model(tokens()), expected)
    return same


def test_inference_mode_may_change() -> None:
    assert run_ranks(2, modes) == [True, True]


def holding(keeps: bool, repeats: bool = True) -> dict[str, float]:
    """Bytes that this process keeps alive for a sharded model, as shares of its weights.

    Args:
        keeps: hold on to what the model had before: what a wrong implementation does.
        repeats: as `apply_hsdp_to_model` has it.
    """
    start = held_bytes()
    model = toy(num_blocks=8, width=96, make=lambda: Block(96))
    total = own_bytes(model)
    whole = held_bytes() - start
    kept = [parameter.data for parameter in model.parameters()] if keeps else []
    apply_hsdp_to_model(model, config(), repeats=repeats)
    loaded = held_bytes() - start
    for _ in range(3):
        outputs(model)
    ran = held_bytes() - start
    del kept
    unit = own_bytes(toy(num_blocks=1, width=96, make=lambda: Block(96)).blocks[0])
    return {"whole": whole / total, "loaded": loaded / total, "ran": ran / total, "unit": unit / total}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_its_part_and_no_more(ranks: int) -> None:
    for shares in run_ranks(ranks, holding, False):
        assert shares["whole"] == 1
        assert shares["loaded"] <= 1.1 / ranks
        assert shares["ran"] <= 1.1 / ranks + shares["unit"]  # the first unit of the next forward
    for shares in run_ranks(ranks, holding, False, False):
        assert shares["ran"] <= 1.1 / ranks


def test_weights_that_somebody_keeps_are_seen() -> None:
    for shares in run_ranks(2, holding, True):
        assert shares["loaded"] > 1.4


def counts() -> tuple[int, dict[str, int]]:
    model = toy(num_blocks=5)
    return shard_model(model, mesh(), config()), dict(shards.shard_group(mesh()).traffic.num_calls)


def test_the_number_of_units_is_blocks_and_root() -> None:
    assert [number for number, _ in run_ranks(2, counts)] == [6, 6]


def warned() -> list[str]:
    model = toy()
    expected = outputs(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_hsdp_to_model(model, config(hsdp_replicate_size=2, hsdp_shard_size=1))
    assert torch.equal(outputs(model), expected)
    return [str(warning.message) for warning in caught]


def test_groups_of_one_rank_say_so() -> None:
    for said in run_ranks(2, warned):
        assert len(said) == 1
        assert "groups of 1 rank" in said[0] and "offload='layerwise'" in said[0]


def refused(case: str) -> str:
    model = toy()
    given: HSDPInferenceConfig = config()
    options: dict[str, Any] = {}
    if case == "off":
        given = HSDPInferenceConfig()
    elif case == "product":
        given = config(hsdp_replicate_size=2, hsdp_shard_size=2)
    elif case == "no units":
        model = toy(num_blocks=0)
    elif case == "twice":
        apply_hsdp_to_model(model, given)
    elif case == "twice, gathered":
        given = config(reshard_after_forward=False)
        apply_hsdp_to_model(model, given)
        outputs(model)
    elif case == "meta":
        model = model.to("meta")
    elif case == "places":
        model.head.to("meta")
        options["target_device"] = "cpu"
    elif case == "hook":
        model.blocks[1]._hf_hook = object()
    elif case == "prefetch":
        options["prefetch"] = -1
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    try:
        apply_hsdp_to_model(model, given, **options)
    except ShardingError as error:
        assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("off", "enabled=False"),
        ("product", "hsdp_replicate_size(2) * hsdp_shard_size(2) = 4 is not world_size(2)"),
        ("no units", "Toy has 0 units"),
        ("twice", "Toy is sharded already, over the ranks of a mesh. Load the model again."),
        ("twice, gathered", "Toy is sharded already, over the ranks of a mesh. Load the model again."),
        ("meta", "Toy has weights on the meta device"),
        ("places", "Toy has weights on the meta device"),
        ("hook", "blocks.1 carries a hook of accelerate"),
        ("prefetch", "prefetch=-1 is not a whole number"),
    ],
)
def test_what_is_refused(case: str, message: str) -> None:
    for said in run_ranks(2, refused, case):
        assert message in said


def test_one_process_without_ranks_is_refused() -> None:
    with pytest.raises(ShardingError, match=re.escape("1 rank is running, and no process group")):
        apply_hsdp_to_model(toy(), config())
    with pytest.raises(PenstockError, match=r"hsdp_shard_size\(4\) = 4 is not world_size\(1\)"):
        apply_hsdp_to_model(toy(), config(hsdp_shard_size=4))

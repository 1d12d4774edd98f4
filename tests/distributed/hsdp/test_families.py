"""Real classes with sharded weights: the same outputs to the bit, and one gather per unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from penstock.config import ParallelConfig
from penstock.distributed.hsdp import shards
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.errors import ConfigError
from penstock.models.stacks import find_stacks
from tests.distributed.hsdp.toys import config
from tests.distributed.sequences import CASES, cast, difference, mesh_of, run
from tests.ranks import run_ranks
from tests.tolerance import tolerance_of
from tests.zoo import encoders, tokenizers

FOUR = ("flux", "wan", "ltx2")
UNUSED = {"flux3": 2}
"""Units that a class does not run with these inputs: nobody gathers them."""


def sharded(model: nn.Module, **options: Any) -> int:
    """Shards a model in place; the number of its units."""
    mesh = shards.shard_mesh("cpu", 1, dist.get_world_size())
    return shards.shard_model(model, mesh, config(**options))


def compare(name: str, heads: int = 4) -> tuple[int, int, float, int]:
    """Blocks of the stacks, units, the largest relative difference, and gathers of the third forward."""
    case = CASES[name]
    model = case.build(heads=heads)
    blocks = len({id(block) for stack in find_stacks(model) for block in stack.blocks})
    size = case.variants[-1]
    expected = run(model, case.inputs(size))
    units = sharded(model)
    group = shards.shard_group(shards.shard_mesh("cpu", 1, dist.get_world_size()))
    far = 0.0
    for _ in range(3):
        group.traffic.clear()
        far = max(far, difference(run(model, case.inputs(size)), expected))
    return blocks, units, far, group.traffic.num_calls["all_gather"]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_what_one_makes(name: str) -> None:
    for blocks, units, far, calls in run_ranks(2, compare, name):
        assert units == blocks + 1
        assert calls == units - UNUSED.get(name, 0)
        assert far == 0


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_make_what_one_makes(name: str, heads: int) -> None:
    for blocks, units, far, calls in run_ranks(4, compare, name, heads):
        assert units == calls == blocks + 1
        assert far == 0


def named_by_numbers() -> tuple[int, int, int]:
    model = CASES["ltx2"].build()
    condition = lambda name, module: "transformer_blocks" in name and name.rpartition(".")[2].isdigit()  # noqa: E731
    model._hsdp_shard_conditions = [condition]
    matched = sum(condition(name, module) for name, module in model.named_modules())
    return len(model.transformer_blocks), matched, sharded(model)


def test_units_of_ltx2_are_its_blocks_and_the_root_whatever_their_parts_are_called() -> None:
    for blocks, matched, units in run_ranks(2, named_by_numbers):
        assert units == blocks + 1 < matched


def in_sixteen_bits() -> tuple[set[str], set[str], float]:
    """Names of float32 shards, names that the class keeps, and the difference to a model cast as when it is loaded."""
    case = CASES["wan"]
    plain, model = case.build(), case.build()
    kept = set(plain._keep_in_fp32_modules)
    for name, parameter in plain.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    inputs = cast(case.inputs("even"), torch.bfloat16)
    expected = run(plain, inputs)
    sharded(model, param_dtype=torch.bfloat16)
    far = difference(run(model, inputs), expected)
    assert model.dtype == plain.dtype
    parameters = dict(model.named_parameters())
    assert all(isinstance(value, DTensor) or value.shape[0] <= 1 for value in parameters.values())
    islands = {name for name, value in parameters.items() if value.dtype == torch.float32}
    return islands, {name for name in parameters if kept.intersection(name.split("."))}, far


def test_sixteen_bits_are_those_of_loading() -> None:
    for islands, kept, far in run_ranks(2, in_sixteen_bits):
        assert islands == kept != set()
        assert far == 0


def with_sequence(is_first: bool) -> tuple[float, list[torch.Tensor]]:
    """A denoiser whose weights are sharded over the ranks that its sequence is split over: how far, as a share of what
    is allowed, and what it makes."""
    case = CASES["flux"]
    model = case.build()
    expected = run(model, case.inputs("odd"))
    allowed = tolerance_of(model, lambda: run(model, case.inputs("odd")), expected)
    mesh = mesh_of(2, 1)
    if is_first:
        apply_sequence(model, check_sequence(model, ParallelConfig()), mesh)
    sharded(model)
    if not is_first:
        apply_sequence(model, check_sequence(model, ParallelConfig()), mesh)
    run(model, case.inputs("odd"))
    made = run(model, case.inputs("odd"))
    return difference(made, expected) / allowed, made


def test_sequences_are_split_over_the_same_ranks_before_or_after() -> None:
    before, after = (run_ranks(2, with_sequence, is_first) for is_first in (True, False))
    for (far, made), (other_far, other) in zip(before, after, strict=True):
        assert far < 1 and other_far < 1
        assert difference(made, other) == 0


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: encoders.t5(tokenizers.t5()),
    "umt5": lambda: encoders.umt5(tokenizers.t5()),
    "clip": lambda: encoders.clip(tokenizers.clip(), projected=True),
    "qwen2": lambda: encoders.qwen25_vl_text(tokenizers.qwen2()),
    "gemma3": lambda: encoders.gemma3(tokenizers.gemma()),
}


def encoder(name: str) -> nn.Module:
    """An encoder with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ENCODERS[name]().eval()


@torch.no_grad()
def encode(name: str) -> tuple[int, int, float]:
    """Layers, units, and the difference of all hidden states, which transformers collects by the names of classes."""
    ids = torch.arange(4, 16).view(2, 6)
    options = {"input_ids": ids, "output_hidden_states": True}
    expected = list(encoder(name)(**options)["hidden_states"])
    model = encoder(name)
    layers = {id(block) for stack in find_stacks(model) for block in stack.blocks}
    units = sharded(model)
    return len(layers), units, max(difference(list(model(**options)["hidden_states"]), expected) for _ in range(2))


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_make_the_same(name: str) -> None:
    for layers, units, far in run_ranks(2, encode, name):
        assert units == layers + 1
        assert far == 0


def names() -> tuple[str, str, list[str], list[str]]:
    """What a denoiser and its blocks are called, and its stacks, before and after."""
    model = CASES["flux"].build()
    before = [stack.path for stack in find_stacks(model)]
    sharded(model)
    after = [stack.path for stack in find_stacks(model)]
    return str(type(model)), type(model.transformer_blocks[0]).__name__, before, after


def test_classes_keep_their_names() -> None:
    for model, block, before, after in run_ranks(2, names):
        assert model == "<class 'diffusers.models.transformers.transformer_flux.FluxTransformer2DModel'>"
        assert block == "FluxTransformerBlock"
        assert before == after != []


def adapted() -> tuple[float, float, list[str]]:
    """Differences to a plain model with the adapter, and to one without; what is said to an adapter that comes late."""
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    case = CASES["flux"]
    bare = run(case.build(), case.inputs("even"))
    model = case.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dist.get_world_size())
        model.add_adapter(adapter)
    expected = run(model, case.inputs("even"))
    sharded(model)
    made = run(model, case.inputs("even"))
    said = []
    for late in (lambda: model.add_adapter(adapter, "late"), lambda: model.load_lora_adapter({})):
        try:
            late()
        except ConfigError as error:
            said.append(str(error))
    assert difference(run(model, case.inputs("even")), expected) == 0
    return difference(made, expected), difference(made, bare), said


def test_adapters_come_before_shards() -> None:
    for far, moved, said in run_ranks(2, adapted):
        assert far == 0 < moved
        assert [message.split(":")[0] for message in said] == [
            "FluxTransformer2DModel.add_adapter",
            "FluxTransformer2DModel.load_lora_adapter",
        ]

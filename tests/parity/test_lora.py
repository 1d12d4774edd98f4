"""Adapters on a streamed pipeline, through diffusers and peft as ever: exact while they act, exact after they go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import penstock
from penstock.errors import ConfigError
from tests import zoo
from tests.parity.test_offload import is_equal
from tests.ranks import run_ranks

TARGETS = {"flux": ["to_q", "to_k", "to_out.0"], "wan21": ["to_q", "to_v"]}
pytestmark = pytest.mark.filterwarnings("ignore:No LoRA keys")


@pytest.fixture(scope="module", params=list(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(name: str, zoo_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter whose weights are random, and so change the picture."""
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder(name))
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS[name])
    pipeline.transformer.add_adapter(config, "made")
    folder = tmp_path_factory.mktemp(f"{name}-lora")
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="made")
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def stages(pipeline: Any, name: str, adapter: Path, is_loaded: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """What a pipeline makes with the adapter, with half of it, and after it was unloaded."""
    if not is_loaded:
        pipeline.load_lora_weights(adapter, adapter_name="style")
    made = [zoo.tensors(zoo.run(pipeline, name))]
    pipeline.set_adapters("style", 0.5)
    made.append(zoo.tensors(zoo.run(pipeline, name)))
    pipeline.unload_lora_weights()
    made.append(zoo.tensors(zoo.run(pipeline, name)))
    return made


@pytest.mark.parametrize("budget", ["least", "1GiB"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before apply", "after apply"])
def test_adapter_is_exact_while_it_acts_and_after_it_went(
    name: str, adapter: Path, budget: str, is_first: bool, zoo_folder: Callable[[str], Path]
) -> None:
    plain_pipeline = DiffusionPipeline.from_pretrained(zoo_folder(name))
    base = zoo.tensors(zoo.run(plain_pipeline, name))
    plain = stages(plain_pipeline, name, adapter)
    assert not is_equal(plain[0], plain[1]) and not is_equal(plain[1], plain[2])
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder(name))
    if is_first:
        pipeline.load_lora_weights(adapter, adapter_name="style")
    with penstock.apply(pipeline, offload="layerwise", max_weight_memory=budget, check=True):
        if not is_first:
            assert is_equal(base, zoo.tensors(zoo.run(pipeline, name)))
        streamed = stages(pipeline, name, adapter, is_loaded=is_first)
    assert all(is_equal(one, other) for one, other in zip(plain, streamed, strict=True))
    assert is_equal(base, zoo.tensors(zoo.run(pipeline, name)))


def test_merging_an_adapter_into_streamed_weights_is_refused_and_merged_weights_stream(
    name: str, adapter: Path, zoo_folder: Callable[[str], Path]
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder(name))
    pipeline.load_lora_weights(adapter, adapter_name="style")
    with penstock.apply(pipeline, offload="layerwise"), pytest.raises(ConfigError, match="remove"):
        pipeline.fuse_lora()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = zoo.tensors(zoo.run(pipeline, name))
    with penstock.apply(pipeline, offload="layerwise", check=True) as placed:
        assert is_equal(merged, zoo.tensors(zoo.run(pipeline, name)))  # not the file's weights: they were changed
        assert any("host" in unit.source for unit in placed.report().units)


def test_adapter_is_hot_swapped_in_place(name: str, adapter: Path, zoo_folder: Callable[[str], Path]) -> None:
    pictures = []
    for is_streamed in (False, True):
        pipeline = DiffusionPipeline.from_pretrained(zoo_folder(name))
        pipeline.load_lora_weights(adapter, adapter_name="style")
        for module in pipeline.transformer.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["style"].weight.data.mul_(0.3)  # another adapter in its place
        placed = penstock.apply(pipeline, offload="layerwise" if is_streamed else "none")
        faint = zoo.tensors(zoo.run(pipeline, name))
        pipeline.load_lora_weights(adapter, adapter_name="style", hotswap=True)
        pictures.append((faint, zoo.tensors(zoo.run(pipeline, name))))
        placed.remove()
    assert is_equal(pictures[0][0], pictures[1][0]) and is_equal(pictures[0][1], pictures[1][1])
    assert not is_equal(*pictures[0])


def try_sharded(name: str, folder: Path, adapter: Path, way: str, is_first: bool) -> bool:
    """On every rank: whether an adapter on shards makes what it makes on whole weights, and leaves no trace."""
    plain = DiffusionPipeline.from_pretrained(folder)
    base, wanted = zoo.tensors(zoo.run(plain, name)), stages(plain, name, adapter)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if is_first:
        pipeline.load_lora_weights(adapter, adapter_name="style")
    parallel = penstock.ParallelConfig(use_hsdp=True, hsdp_shard_size=2)
    with penstock.apply(pipeline, parallel=parallel, device="cpu", offload=way, check=True):
        found = stages(pipeline, name, adapter, is_loaded=is_first)
    is_right = all(is_equal(one, other) for one, other in zip(wanted, found, strict=True))
    return is_right and is_equal(base, zoo.tensors(zoo.run(pipeline, name)))


@pytest.mark.parametrize("is_first", [True, False], ids=["before apply", "after apply"])
@pytest.mark.parametrize("way", ["sharded", "layerwise"])
def test_adapter_on_sharded_weights(
    name: str, adapter: Path, way: str, is_first: bool, zoo_folder: Callable[[str], Path]
) -> None:
    assert run_ranks(2, try_sharded, name, zoo_folder(name), adapter, way, is_first) == [True, True]

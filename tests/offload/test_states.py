"""Saving a placed component gives the weights themselves, and it streams on afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.offload.cold import ColdTensor
from tests import zoo
from tests.offload.toys import Pipeline, streamed


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert not isinstance(found[name], ColdTensor)
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def casts_of(pipeline: Any, dtype: torch.dtype) -> dict[int, torch.dtype]:
    modules = [part for part in vars(pipeline).values() if isinstance(part, nn.Module)]
    return {id(weight): dtype for module in modules for weight in module.parameters()}


def slotwise(pipeline: Any, dtype: torch.dtype | None) -> Any:
    return streamed(pipeline, 1, dtypes=None if dtype is None else casts_of(pipeline, dtype))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_states_are_the_plain_ones_before_during_and_after_a_run(dtype: torch.dtype | None) -> None:
    pipeline, expected = Pipeline(), Pipeline()
    if dtype is not None:
        expected.transformer.to(dtype)
    with slotwise(pipeline, dtype) as streamer:
        during: list[Any] = []
        pipeline.transformer.blocks[4].register_forward_hook(
            lambda *_: during.append(pipeline.transformer.state_dict()) if not during else None
        )
        assert_same(pipeline.transformer.state_dict(), expected.transformer.state_dict())
        with torch.no_grad():
            pipeline.transformer(torch.ones(1, 16, dtype=dtype), torch.tensor(1.0, dtype=dtype))
        assert_same(during[0], expected.transformer.state_dict())
        fills = streamer.residency.num_fills
        assert_same(pipeline.transformer.state_dict(), expected.transformer.state_dict())
        assert streamer.residency.num_fills == fills  # read from where they are stored
        for tenant in streamer.tenants:
            for weight, cold, live in zip(tenant.unit.weights, tenant.cold, tenant.live, strict=True):
                assert any(weight.table[weight.key] is known for known in (cold, live))


def test_prefixes_and_variables_are_honoured() -> None:
    pipeline, expected = Pipeline(), Pipeline()
    with streamed(pipeline, 1):
        assert_same(
            pipeline.transformer.state_dict(prefix="a.", keep_vars=True),
            expected.transformer.state_dict(prefix="a.", keep_vars=True),
        )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_tied_weights_stay_tied(dtype: torch.dtype | None) -> None:
    pipeline = Pipeline()
    pipeline.transformer.head.weight = pipeline.transformer.blocks[1].linear.weight
    with slotwise(pipeline, dtype):
        state = pipeline.transformer.state_dict()
    assert state["head.weight"].data_ptr() == state["blocks.1.linear.weight"].data_ptr()
    assert state["head.weight"].data_ptr() != state["blocks.2.linear.weight"].data_ptr()


def test_a_state_of_a_block_alone_is_its_weights() -> None:
    pipeline, expected = Pipeline(), Pipeline()
    with streamed(pipeline, 1):
        found = pipeline.transformer.blocks[3].state_dict()
        for name, weight in expected.transformer.blocks[3].state_dict().items():
            assert torch.equal(found[name], weight)


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", ["flux", "sd15", "qwen_image"])
def test_a_saved_pipeline_is_the_plain_one_and_streams_on(name: str, tmp_path: Path) -> None:
    plain, pipeline = zoo.build(name), zoo.build(name)
    plain.save_pretrained(tmp_path / "plain")
    expected = zoo.tensors(zoo.run(plain, name))
    with streamed(pipeline, 1, is_checked=True) as streamer:
        for number in range(2):
            pipeline.save_pretrained(tmp_path / f"streamed{number}")
            assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, name)), expected))
        assert streamer.residency.num_fills > 10
    before, *after = (saved(tmp_path / folder) for folder in ("plain", "streamed0", "streamed1"))
    for found in after:
        assert list(found) == list(before) and len(before) >= 3
        for file, weights in before.items():
            assert_same(dict(sorted(found[file].items())), dict(sorted(weights.items())))


def test_a_saved_cast_pipeline_is_saved_as_it_runs(tmp_path: Path) -> None:
    plain, pipeline = zoo.build("flux"), zoo.build("flux")
    for part in (plain.transformer, plain.text_encoder_2, plain.vae, plain.text_encoder):
        part.to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    with slotwise(pipeline, torch.bfloat16):
        pipeline.save_pretrained(tmp_path / "streamed")
    before, after = saved(tmp_path / "plain"), saved(tmp_path / "streamed")
    assert list(after) == list(before)
    for file, weights in before.items():
        assert_same(dict(sorted(after[file].items())), dict(sorted(weights.items())))

"""A placed pipeline makes what the plain one makes, bit for bit: every family, mode and budget, loaded or built.

Every fill is hashed against its file and what is given up is NaN, so that weights that are not there would show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import penstock
from tests import zoo
from tests.turns import by_turns
from tests.zoo.stranger import StrangerPipeline

MODES = ("sequential", "layerwise")
BUDGETS = ("least", "half", "all")
CAST = ("flux", "sd15", "wan22", "qwen_image", "hunyuan_video15", "ltx2")
DTYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def stock(name: str, folder: Path) -> Any:
    return (StrangerPipeline if name == "stranger" else DiffusionPipeline).from_pretrained(folder)


def is_equal(reference: tuple[torch.Tensor, ...], candidate: tuple[torch.Tensor, ...]) -> bool:
    pairs = zip(reference, candidate, strict=True)
    return bool(reference) and all(torch.equal(one, other) for one, other in pairs)


def budget(share: str, pipeline: Any, mode: str) -> str | int:
    """A share of the weights, or the least that works where that is more."""
    if share == "least":
        return share
    with penstock.apply(pipeline, offload=mode, max_weight_memory="least") as placed:
        plan = placed.plan
    return max(plan.least_bytes, plan.weight_bytes // 2 if share == "half" else plan.weight_bytes * 2)


@pytest.mark.parametrize(
    ("name", "way"), by_turns([(name, way) for name in zoo.NAMES for way in ("mapped", "built")], 7)
)
def test_placed_in_place_is_bit_identical_in_every_mode_and_budget(
    name: str, way: str, zoo_folder: Callable[[str], Path]
) -> None:
    pipeline = zoo.build(name) if way == "built" else stock(name, zoo_folder(name))
    plain = zoo.tensors(zoo.run(pipeline, name))
    for mode in MODES:
        for share in BUDGETS:
            options = {"offload": mode, "max_weight_memory": budget(share, pipeline, mode)}
            with penstock.apply(pipeline, check=True, prompt_cache=0, **options) as placed:
                for _ in range(2):
                    assert is_equal(plain, zoo.tensors(zoo.run(pipeline, name))), options
                report = placed.report()
            assert 0 < report.peak_bytes <= placed.plan.promised_bytes <= max(placed.plan.budget_bytes or 0, 1) or (
                share == "least" and report.peak_bytes <= placed.plan.least_bytes
            )
            assert {unit.source for unit in report.units} <= ({"host"} if way == "built" else {"file", "host"})
    assert is_equal(plain, zoo.tensors(zoo.run(pipeline, name)))


@pytest.mark.parametrize("name", by_turns([name for name in zoo.NAMES if name != "stranger"], 7, 1))
def test_loaded_from_a_path_is_bit_identical_in_every_mode_and_budget(
    name: str, zoo_folder: Callable[[str], Path]
) -> None:
    folder = zoo_folder(name)
    plain = zoo.tensors(zoo.run(stock(name, folder), name))
    for mode in MODES:
        for share in BUDGETS:
            size = budget(share, stock(name, folder), mode)
            pipeline = penstock.load(folder, offload=mode, max_weight_memory=size, check=True)
            assert is_equal(plain, zoo.tensors(zoo.run(pipeline, name))), (mode, share)
            placed = penstock.placed_on(pipeline)
            assert placed is not None
            report = placed.report()
            assert report.peak_bytes <= placed.plan.promised_bytes
            assert all("file" in unit.source for unit in report.units)  # nothing was copied to host memory
            placed.remove()


@pytest.mark.parametrize(
    ("name", "stored", "asked"), by_turns([(name, *dtypes) for name in CAST for dtypes in DTYPES], 4), ids=str
)
def test_casts_on_the_way_to_the_device_equal_stock_casts(
    name: str, stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    folder = zoo.folder(name, tmp_path, stored)
    plain = zoo.tensors(zoo.run(DiffusionPipeline.from_pretrained(folder, dtype=asked), name))
    for mode in MODES:
        pipeline = penstock.load(folder, dtype=asked, offload=mode, check=True)
        assert is_equal(plain, zoo.tensors(zoo.run(pipeline, name)))


def test_wrong_weights_would_be_noticed(zoo_folder: Callable[[str], Path]) -> None:
    """The comparison can fail: two blocks that trade their weights on the way are told apart."""
    pipeline = stock("flux", zoo_folder("flux"))
    plain = zoo.tensors(zoo.run(pipeline, "flux"))
    blocks = pipeline.transformer.single_transformer_blocks
    blocks[0].proj_out.weight, blocks[1].proj_out.weight = blocks[1].proj_out.weight, blocks[0].proj_out.weight
    with penstock.apply(pipeline, offload="layerwise"):
        assert not is_equal(plain, zoo.tensors(zoo.run(pipeline, "flux")))

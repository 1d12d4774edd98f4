"""On the device a placed pipeline makes what the plain one makes there, bit for bit, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import penstock
from tests import zoo
from tests.zoo.stranger import StrangerPipeline

pytestmark = pytest.mark.gpu
WAYS = [("layerwise", "least"), ("layerwise", "half"), ("layerwise", "all"), ("sequential", "least"), ("none", "")]


def plain(name: str, folder: Path, device: torch.device) -> Any:
    stock = StrangerPipeline if name == "stranger" else DiffusionPipeline
    return stock.from_pretrained(folder).to(device)


def made(pipeline: Any, name: str) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return tuple(tensor.cpu() for tensor in zoo.tensors(zoo.run(pipeline, name)))


def placed(name: str, folder: Path, device: torch.device, mode: str, share: str) -> Any:
    """A pipeline that penstock has loaded with a share of its weights on the device."""
    options: dict[str, Any] = {"device": str(device), "dtype": "float32", "offload": mode}
    if mode != "none":
        pipeline = penstock.load(folder, max_weight_memory="least", check=True, **options)
        handle = penstock.placed_on(pipeline)
        assert handle is not None
        plan = handle.plan
        if share == "least":
            return pipeline
        handle.remove()
        options["max_weight_memory"] = max(plan.least_bytes, plan.weight_bytes * {"half": 1, "all": 4}[share] // 2)
    return penstock.load(folder, **options)


def is_equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return bool(one) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "stranger"])
def test_every_mode_makes_the_plain_picture(name: str, zoo_folder: Callable[[str], Path], device: torch.device) -> None:
    folder = zoo_folder(name)
    stock = plain(name, folder, device)
    expected = made(stock, name)
    assert is_equal(expected, made(stock, name)), "the plain pipeline does not repeat itself: nothing can be compared"
    for mode, share in WAYS:
        pipeline = placed(name, folder, device, mode, share)
        for _ in range(2):  # the second run begins with what the first has left
            assert is_equal(expected, made(pipeline, name)), (mode, share)
        handle = penstock.placed_on(pipeline)
        if handle is not None and mode != "none":
            report = handle.report()
            assert report.peak_bytes <= report.plan.promised_bytes
            handle.remove()


def test_wrong_weights_would_be_noticed(zoo_folder: Callable[[str], Path], device: torch.device) -> None:
    folder = zoo_folder("flux")
    expected = made(plain("flux", folder, device), "flux")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    blocks = pipeline.transformer.single_transformer_blocks
    blocks[0].proj_out.weight, blocks[1].proj_out.weight = blocks[1].proj_out.weight, blocks[0].proj_out.weight
    with penstock.apply(pipeline, device=str(device), offload="layerwise"):
        assert not is_equal(expected, made(pipeline, "flux"))

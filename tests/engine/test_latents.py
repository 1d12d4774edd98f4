"""Latents are seen on their way to every VAE, and refused when they are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import penstock
from penstock.engine.latents import require_finite, seen_latents
from tests import zoo


@pytest.mark.parametrize(("name", "count"), [("flux", 1), ("ltx2", 2), ("stranger", 0)])
def test_what_is_decoded_is_seen(name: str, count: int) -> None:
    seen: list[Any] = []
    pipeline = zoo.build(name)
    with seen_latents(pipeline, seen.append):
        zoo.run(pipeline, name)
    assert len(seen) == count
    assert all(isinstance(latents, torch.Tensor) for latents in seen)
    zoo.run(pipeline, name)
    assert len(seen) == count


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_would_be_a_black_picture(value: float) -> None:
    require_finite(torch.ones(3))
    require_finite(None)
    with pytest.raises(penstock.GenerationError, match="not finite, in bfloat16. Try --dtype float32"):
        require_finite(torch.tensor([1.0, value], dtype=torch.bfloat16))


def test_broken_weights_are_noticed() -> None:
    pipeline = zoo.build("flux")
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.fill_(float("nan"))
    request = penstock.GenerationRequest(prompt="x", width=56, height=40, num_inference_steps=1)
    with pytest.raises(penstock.GenerationError, match="latents that are not finite"):
        list(penstock.generate(pipeline, request))

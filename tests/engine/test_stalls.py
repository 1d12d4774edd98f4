"""Residents for no wait: the formula, on what a streamer says it measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.config import OffloadConfig
from penstock.engine.plans import plan_pipeline
from penstock.engine.stalls import zero_stalls
from tests.offload.toys import Pipeline


class Measured:
    """A streamer that has measured something."""

    def __init__(self, compute_s: float, fill_s: float) -> None:
        self.times = {"transformer": (compute_s, fill_s)}

    def measured(self, component: str) -> tuple[float, float] | None:
        """Seconds per block."""
        return self.times.get(component)


@pytest.mark.parametrize(
    ("compute_s", "fill_s", "stay"), [(1.0, 2.0, 3), (1.0, 1.0, 0), (2.0, 1.0, 0), (0.1, 1.0, 6), (1.0, 0.0, 0)]
)
def test_so_many_blocks_stay_that_filling_hides(compute_s: float, fill_s: float, stay: int) -> None:
    config = OffloadConfig(device="cpu", offload="layerwise")
    planned = plan_pipeline(Pipeline(), config, torch.device("cpu"), lambda *_: None)
    streamer: Any = Measured(compute_s, fill_s)
    (found,) = zero_stalls(planned, streamer)
    assert (found.component, found.num_blocks, found.num_resident) == ("transformer", 6, stay)
    assert found.budget_bytes >= planned.plan.least_bytes
    streamer.times = {}
    assert zero_stalls(planned, streamer) == ()

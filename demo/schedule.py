"""The learning rate that every stage of the training follows."""

from __future__ import annotations

import math

FLOOR = 0.01


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `FLOOR` of it.

    Args:
        step: Steps taken so far.
        steps: Steps of the whole stage.
        peak: Highest learning rate.
        warmup: Steps until the peak.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))

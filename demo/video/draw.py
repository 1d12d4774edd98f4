"""Drawings of motions: clips of 64 x 64 pixels in which one flat shape crosses a white ground at constant speed."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw

from draw import PALETTE, SIZE, SUPERSAMPLING, WHITE, Spot, outline
from video.grammar import Motion

FRAMES = 65
STRIDES = (1, 2, 4, 8)
"""Every so many frames of a drawing are the same motion in fewer frames: 65, 33, 17 and 9."""

START, END = (14.0, 20.0), (44.0, 50.0)
ACROSS = (24.0, 40.0)
RADII = (8.5, 11.0)


def path(direction: str, rng: random.Random) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where a motion begins and ends, as (x, y) in pixels."""
    start, end, across = rng.uniform(*START), rng.uniform(*END), rng.uniform(*ACROSS)
    if direction in ("left", "up"):
        start, end = SIZE - start, SIZE - end
    if direction in ("left", "right"):
        return (start, across), (end, across)
    return (across, start), (across, end)


def draw(motion: Motion, rng: random.Random) -> np.ndarray:
    """Draw a motion with a random path and size.

    Args:
        motion: What to draw.
        rng: Source of the jitter.

    Returns:
        Frames as `(FRAMES, SIZE, SIZE, 3)` bytes.
    """
    (x, y), (end_x, end_y) = path(motion.direction, rng)
    radius = rng.uniform(*RADII) * SUPERSAMPLING
    frames = []
    for number in range(FRAMES):
        share = number / (FRAMES - 1)
        spot = Spot(SUPERSAMPLING * (x + share * (end_x - x)), SUPERSAMPLING * (y + share * (end_y - y)), radius)
        large = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), WHITE)
        outline(ImageDraw.Draw(large), motion.thing.shape, spot, PALETTE[motion.thing.colour])
        frames.append(np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return np.stack(frames)


def draw_many(motions: list[Motion], seed: int) -> np.ndarray:
    """Draw one clip per motion: `(count, FRAMES, SIZE, SIZE, 3)` bytes.

    Args:
        motions: What to draw.
        seed: Seed of the jitter.
    """
    rng = random.Random(seed)
    return np.stack([draw(motion, rng) for motion in motions])

"""Drawings of scenes: 64 x 64 pictures with flat colours and antialiased edges on white."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from grammar import Scene

SIZE = 64
SUPERSAMPLING = 4
WHITE = (255, 255, 255)
PALETTE = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 225), "yellow": (240, 210, 50)}
# Slot -> centre (x, y) in pixels before jitter.
CENTRES = {"centre": (32, 32), "left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48)}
JITTER = 2.0
SINGLE_RADII = (13.0, 16.0)
PAIR_RADII = (9.5, 11.0)


@dataclass(frozen=True)
class Spot:
    """Where one shape is drawn, in pixels.

    Attributes:
        x: Centre, from the left edge.
        y: Centre, from the top edge.
        radius: Half the height of a circle or triangle; a square is a little smaller to look equally large.
    """

    x: float
    y: float
    radius: float


def outline(canvas: ImageDraw.ImageDraw, shape: str, spot: Spot, fill: tuple[int, int, int] | int) -> None:
    """Fill one shape on a canvas whose pixels are the units of `spot`."""
    x, y, radius = spot.x, spot.y, spot.radius
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = 0.88 * radius
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        canvas.polygon([(x, y - radius), (x + 1.1 * radius, y + radius), (x - 1.1 * radius, y + radius)], fill=fill)


def random_spot(slot: str, single: bool, rng: random.Random) -> Spot:
    """Pick a place near the slot's centre and a size.

    Args:
        slot: One of the grammar's slots.
        single: Whether the thing has the picture for itself, and so is drawn larger.
        rng: Source of the jitter.
    """
    x, y = CENTRES[slot]
    radius = rng.uniform(*(SINGLE_RADII if single else PAIR_RADII))
    return Spot(x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER), radius)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene with a random jitter of places and sizes.

    Args:
        scene: What to draw.
        rng: Source of the jitter.

    Returns:
        An RGB picture of `SIZE` x `SIZE` pixels.
    """
    large = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), WHITE)
    canvas = ImageDraw.Draw(large)
    for slot, thing in scene.placed:
        spot = random_spot(slot, len(scene.placed) == 1, rng)
        scaled = Spot(spot.x * SUPERSAMPLING, spot.y * SUPERSAMPLING, spot.radius * SUPERSAMPLING)
        outline(canvas, thing.shape, scaled, PALETTE[thing.colour])
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_many(scenes: list[Scene], seed: int) -> np.ndarray:
    """Draw one picture per scene.

    Args:
        scenes: What to draw.
        seed: Seed of the jitter.

    Returns:
        Pictures as `(count, SIZE, SIZE, 3)` bytes.
    """
    rng = random.Random(seed)
    return np.stack([np.asarray(draw(scene, rng)) for scene in scenes])

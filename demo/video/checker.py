"""Reads a clip back from its pixels: what moves, where to, and whether that is what a prompt asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from checker import Found, find
from video.grammar import motion_of

MIN_DISTANCE = 12.0
MIN_STRAIGHTNESS = 3.0
MAX_BACKWARD = 1.5
MIN_SHAPE_SHARE = 0.75
AXES = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}


@dataclass(frozen=True)
class Verdict:
    """What is right about a clip.

    Attributes:
        colour: Every frame shows one thing, in the colour asked for.
        shape: So does the shape in nearly all frames.
        direction: It moves as asked, straight and never back.
        everything: All of that, and all frames are clean: flat colours on white, and no debris.
    """

    colour: bool
    shape: bool
    direction: bool
    everything: bool

    @property
    def follows(self) -> bool:
        """Whether colour and direction are right, which is what the model is held to."""
        return self.colour and self.direction


def direction_of(centres: np.ndarray) -> str | None:
    """The direction in which a row of points `(n, 2)` moves; None where it is none of the four."""
    moved = centres[-1] - centres[0]
    for name, (axis, sign) in AXES.items():
        distance = sign * moved[axis]
        steps = sign * np.diff(centres[:, axis])
        straight = distance >= MIN_STRAIGHTNESS * abs(moved[1 - axis])
        if distance >= MIN_DISTANCE and straight and (steps > -MAX_BACKWARD).all():
            return name
    return None


def check(frames: Sequence[Image.Image | np.ndarray], prompt: str) -> Verdict:
    """Compare a clip with its prompt.

    Args:
        frames: RGB frames.
        prompt: A prompt of the grammar.
    """
    motion = motion_of(prompt)
    things: list[Found] = []
    clean = True
    for frame in frames:
        found, is_clean = find(np.asarray(frame))
        clean &= is_clean
        if len(found) != 1:
            return Verdict(False, False, False, False)
        things += found
    colour = all(thing.colour == motion.thing.colour for thing in things)
    shape = sum(thing.shape == motion.thing.shape for thing in things) >= MIN_SHAPE_SHARE * len(things)
    direction = direction_of(np.array([thing.centre for thing in things])) == motion.direction
    return Verdict(colour, shape, direction, clean and colour and shape and direction)

"""The words of the video demo: prompts, the motions they describe, and which ones training never sees.

A prompt is `a {colour} {shape} moving {direction}`. Whole combinations are held out: every word of a held-out prompt
is trained on, but never the three together.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

from grammar import COLOURS, SHAPES, Thing

DIRECTIONS = ("left", "right", "up", "down")
WORDS = ("a", *COLOURS, *SHAPES, "moving", *DIRECTIONS)
MAX_WORDS = 5
DESCRIPTION = "a {red|green|blue|yellow} {circle|square|triangle} moving {left|right|up|down}"
PATTERN = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})"
HELD_OUT_PERCENT = 20


@dataclass(frozen=True)
class Motion:
    """One thing on its way.

    Attributes:
        thing: What moves.
        direction: One of `DIRECTIONS`.
    """

    thing: Thing
    direction: str

    def __str__(self) -> str:
        return f"{self.thing} moving {self.direction}"

    def held_out(self) -> bool:
        """Whether training never sees this motion."""
        digest = hashlib.sha256(str(self).encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def motion_of(prompt: str) -> Motion:
    """The motion that a prompt describes.

    Raises:
        ValueError: The prompt is outside the grammar.
    """
    match = re.fullmatch(PATTERN, prompt.strip().lower())
    if match is None:
        raise ValueError(f"outside the grammar: {prompt!r}; expected {DESCRIPTION}")
    colour, shape, direction = match.groups()
    return Motion(Thing(colour, shape), direction)


def motion_prompts(held_out: bool) -> list[str]:
    """The prompts of one side of the split, in a fixed order; both sides together are all 48."""
    motions = [Motion(Thing(c, s), d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]
    return [str(motion) for motion in motions if motion.held_out() == held_out]


def random_motions(count: int, seed: int) -> list[str]:
    """Pick training prompts at random."""
    return random.Random(seed).choices(motion_prompts(held_out=False), k=count)

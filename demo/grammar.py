"""The words of the demo: prompts, the scenes they describe, and which scenes training never sees.

A prompt is `a {colour} {shape}` or `a {colour} {shape} {relation} a {colour} {shape}`. A scene says the same
thing by place: `a red circle left of a blue square` and `a blue square right of a red circle` are one scene.
Scenes, not prompts, are held out, so that no paraphrase of a held-out scene is ever trained on.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
SLOTS = ("centre", "left", "right", "top", "bottom")
# Relation -> (slot of the first thing, slot of the second thing).
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
WORDS = ("a", *COLOURS, *SHAPES, "left", "right", "of", "above", "below")
MAX_WORDS = 8
DESCRIPTION = "a {red|green|blue|yellow} {circle|square|triangle} [{left of|right of|above|below} a {colour} {shape}]"
HELD_OUT_PERCENT = 20
SINGLE_SHARE = 0.2

_THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
PATTERN = rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?"


@dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape.

    Attributes:
        colour: One of `COLOURS`.
        shape: One of `SHAPES`.
    """

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing in each named slot.

    Attributes:
        placed: (slot, thing) pairs, sorted by slot name, so that equal scenes compare equal.
    """

    placed: tuple[tuple[str, Thing], ...]

    def held_out(self) -> bool:
        """Whether training never sees this scene; single things are always trained on."""
        if len(self.placed) == 1:
            return False
        text = "; ".join(f"{slot}: {thing}" for slot, thing in self.placed)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def mentions(prompt: str) -> list[tuple[str, Thing]]:
    """Read a prompt of the grammar.

    Args:
        prompt: The prompt, in any case.

    Returns:
        (slot, thing) of each noun phrase, in the prompt's order.

    Raises:
        ValueError: The prompt is outside the grammar.
    """
    match = re.fullmatch(PATTERN, prompt.strip().lower())
    if match is None:
        raise ValueError(f"outside the grammar: {prompt!r}; expected {DESCRIPTION}")
    first_colour, first_shape, relation, second_colour, second_shape = match.groups()
    first = Thing(first_colour, first_shape)
    if relation is None:
        return [("centre", first)]
    first_slot, second_slot = RELATIONS[relation]
    return [(first_slot, first), (second_slot, Thing(second_colour, second_shape))]


def scene_of(prompt: str) -> Scene:
    """The scene that a prompt describes; see `mentions`."""
    return Scene(tuple(sorted(mentions(prompt))))


def single_prompts() -> list[str]:
    """The prompts that name one thing (12)."""
    return [str(Thing(colour, shape)) for colour in COLOURS for shape in SHAPES]


def pair_prompts(held_out: bool) -> list[str]:
    """The prompts that name two things, of one side of the split.

    Args:
        held_out: Whether to give the prompts whose scenes training never sees, or the others.

    Returns:
        The prompts in a fixed order; both sides together are all 576.
    """
    things = single_prompts()
    prompts = [f"{first} {relation} {second}" for first in things for relation in RELATIONS for second in things]
    return [prompt for prompt in prompts if scene_of(prompt).held_out() == held_out]


def training_prompts() -> list[str]:
    """Every prompt that any stage of the training may see."""
    return single_prompts() + pair_prompts(held_out=False)


def random_prompts(count: int, seed: int) -> list[str]:
    """Pick training prompts at random.

    Args:
        count: How many.
        seed: Seed of the choice.

    Returns:
        Prompts of single things for about `SINGLE_SHARE` of them, of pairs for the rest.
    """
    rng = random.Random(seed)
    singles, pairs = single_prompts(), pair_prompts(held_out=False)
    return [rng.choice(singles if rng.random() < SINGLE_SHARE else pairs) for _ in range(count)]

"""The video demo's grammar and checker: true to its own drawings, and not to be fooled."""

from __future__ import annotations

import random

import numpy as np
import pytest

from video.checker import check
from video.draw import draw
from video.grammar import DIRECTIONS, WORDS, motion_of, motion_prompts

PROMPTS = [*motion_prompts(held_out=False), *motion_prompts(held_out=True)]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def drawn(prompt: str, stride: int = 8) -> np.ndarray:
    return draw(motion_of(prompt), random.Random(prompt))[::stride]


def other(prompt: str, direction: str) -> str:
    return f"{prompt.rsplit(' ', 1)[0]} {direction}"


def test_split_holds_out_combinations_and_no_words() -> None:
    trained, held_out = motion_prompts(held_out=False), motion_prompts(held_out=True)
    assert len(PROMPTS) == len({*trained, *held_out}) == 48 and len(held_out) == 10
    assert {word for prompt in trained for word in prompt.split()} == set(WORDS)


@pytest.mark.parametrize("prompt", ["a red circle", "a red circle moving", "red circle moving up", "a dog moving up"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="outside the grammar"):
        motion_of(prompt)


def test_drawings_are_right() -> None:
    assert [prompt for prompt in PROMPTS if not check(drawn(prompt), prompt).everything] == []


def test_other_things_and_directions_are_told_apart() -> None:
    clip = drawn("a red circle moving left")
    for prompt in PROMPTS:
        verdict = check(clip, prompt)
        assert (verdict.colour, verdict.shape) == ("red" in prompt, "circle" in prompt)
        assert verdict.direction == prompt.endswith("left")
        assert verdict.everything == (prompt == "a red circle moving left")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_clip_played_backwards_moves_the_other_way(direction: str) -> None:
    prompt = f"a blue square moving {direction}"
    backwards = drawn(prompt)[::-1]
    assert not check(backwards, prompt).direction
    assert check(backwards, other(prompt, OPPOSITE[direction])).everything


def test_what_stands_jumps_or_vanishes_does_not_move() -> None:
    prompt = "a green triangle moving up"
    clip = drawn(prompt)
    assert not check([clip[0]] * 9, prompt).direction
    assert not check([clip[0], clip[8], clip[4], clip[8]], prompt).direction
    assert not check([*clip[:4], np.full_like(clip[0], 255), *clip[5:]], prompt).colour

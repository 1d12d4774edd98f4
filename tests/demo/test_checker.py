"""The demo's checker: true to its own drawings, and not to be fooled."""

import numpy as np
import pytest

from checker import check, find
from draw import SIZE, WHITE, draw_many
from grammar import pair_prompts, scene_of, single_prompts

PROMPTS = single_prompts() + pair_prompts(held_out=True) + pair_prompts(held_out=False)
PICTURES = draw_many([scene_of(prompt) for prompt in PROMPTS], seed=7)
NOISE = 12.0


def picture_of(prompt: str) -> np.ndarray:
    return PICTURES[PROMPTS.index(prompt)]


def test_every_drawing_is_right() -> None:
    wrong = [prompt for picture, prompt in zip(PICTURES, PROMPTS, strict=True) if not check(picture, prompt).everything]
    assert wrong == []


def test_noisy_drawings_are_right() -> None:
    noise = np.random.default_rng(0).normal(0, NOISE, PICTURES.shape)
    noisy = (PICTURES + noise).clip(0, 255).astype(np.uint8)
    right = [check(picture, prompt).everything for picture, prompt in zip(noisy, PROMPTS, strict=True)]
    assert np.mean(right) > 0.99


def test_a_drawing_of_another_scene_is_wrong() -> None:
    shifted = [*PROMPTS[1:], PROMPTS[0]]
    for picture, drawn, asked in zip(PICTURES, PROMPTS, shifted, strict=True):
        assert check(picture, asked).everything == (scene_of(drawn) == scene_of(asked))


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ("a blue circle left of a green square", (False, True, True)),
        ("a red circle left of a green circle", (True, False, True)),
        ("a green square left of a red circle", (True, True, False)),
        ("a red circle above a green square", (True, True, False)),
        ("a red square left of a green circle", (True, True, True)),
        ("a red circle", (False, False, False)),
    ],
)
def test_what_is_wrong_is_told_apart(asked: str, right: tuple[bool, bool, bool]) -> None:
    verdict = check(picture_of("a red circle left of a green square"), asked)
    assert (verdict.colour, verdict.shape, verdict.relation) == right
    assert not verdict.everything


def test_an_empty_picture_shows_nothing() -> None:
    blank = np.full((SIZE, SIZE, 3), WHITE, dtype=np.uint8)
    assert find(blank) == ([], True)
    assert not check(blank, "a red circle").everything


def test_debris_and_dirty_colours_are_wrong() -> None:
    prompt = "a yellow triangle"
    littered = picture_of(prompt).copy()
    littered[2:6, 2:7] = (50, 90, 225)
    assert not check(littered, prompt).everything
    dirty = (picture_of(prompt) * 0.6).astype(np.uint8)
    assert not check(dirty, prompt).everything

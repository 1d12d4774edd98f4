"""The demo's grammar: counts, paraphrases and the held-out split."""

import re

import pytest

from grammar import (
    COLOURS,
    PATTERN,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    mentions,
    pair_prompts,
    scene_of,
    single_prompts,
    training_prompts,
)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def all_pairs() -> list[str]:
    return pair_prompts(held_out=True) + pair_prompts(held_out=False)


def paraphrase(prompt: str) -> str:
    relation = next(name for name in RELATIONS if f" {name} " in prompt)
    first, second = prompt.split(f" {relation} ")
    return f"{second} {OPPOSITE[relation]} {first}"


def test_counts() -> None:
    assert len(set(single_prompts())) == len(COLOURS) * len(SHAPES) == 12
    assert len(set(all_pairs())) == 576
    assert len({scene_of(prompt) for prompt in all_pairs()}) == 288


def test_every_prompt_matches_the_pattern_and_reads_back() -> None:
    for prompt in single_prompts() + all_pairs():
        assert re.fullmatch(PATTERN, prompt)
        assert all(str(thing) in prompt for _, thing in mentions(prompt))


def test_scene_of_a_prompt() -> None:
    prompt = "A red CIRCLE below a blue square"
    assert mentions(prompt) == [("bottom", Thing("red", "circle")), ("top", Thing("blue", "square"))]
    assert scene_of("a red square") == Scene((("centre", Thing("red", "square")),))


@pytest.mark.parametrize("prompt", ["", "a red", "a pink circle", "red circle", "a red circle near a blue square"])
def test_prompts_outside_the_grammar_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="outside the grammar"):
        scene_of(prompt)


def test_paraphrases_are_one_scene_on_one_side_of_the_split() -> None:
    held_out = set(pair_prompts(held_out=True))
    for prompt in all_pairs():
        assert scene_of(paraphrase(prompt)) == scene_of(prompt)
        assert (paraphrase(prompt) in held_out) == (prompt in held_out)


def test_about_a_fifth_is_held_out_and_never_trained_on() -> None:
    held_out = pair_prompts(held_out=True)
    assert 0.15 < len(held_out) / 576 < 0.25
    assert not set(held_out) & set(training_prompts())


def test_training_sees_every_thing_in_every_slot() -> None:
    seen = {placed for prompt in training_prompts() for placed in scene_of(prompt).placed}
    assert len(seen) == 5 * len(COLOURS) * len(SHAPES)


def test_both_sides_of_the_split_know_every_word() -> None:
    for prompts in (pair_prompts(held_out=True), pair_prompts(held_out=False)):
        words = {word for prompt in prompts for word in prompt.split()}
        assert {*COLOURS, *SHAPES} <= words
        assert all(any(f" {relation} " in prompt for prompt in prompts) for relation in RELATIONS)

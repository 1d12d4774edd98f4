"""What is checked of a request without a model."""

from __future__ import annotations

import pytest

from penstock.errors import RequestError
from penstock.request import GenerationRequest


@pytest.mark.parametrize("name", ["width", "height", "num_inference_steps", "num_frames", "num_images"])
def test_counts_are_positive(name: str) -> None:
    assert getattr(GenerationRequest(**{name: 1}), name) == 1
    with pytest.raises(RequestError, match=f"{name}=0 is not a whole number from 1 up"):
        GenerationRequest(**{name: 0})


@pytest.mark.parametrize("value", ["64", 1.5, True, -3])
def test_counts_are_whole_numbers(value: object) -> None:
    with pytest.raises(RequestError, match="is not a whole number from 1 up"):
        GenerationRequest(width=value)


@pytest.mark.parametrize("fields", [{"prompt": ["a", "b"]}, {"negative_prompt": 3}, {"image": 1}])
def test_texts_are_texts(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="not a text"):
        GenerationRequest(**fields)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e9])
def test_frame_rate_is_one(rate: float) -> None:
    with pytest.raises(RequestError, match="frame_rate=.* is out of range"):
        GenerationRequest(frame_rate=rate)


def test_every_seed_of_several_pictures_counts() -> None:
    assert GenerationRequest(seed=2**63 - 2, num_images=2)
    with pytest.raises(RequestError, match="out of range"):
        GenerationRequest(seed=2**63 - 1, num_images=2)


def test_arguments_are_a_mapping() -> None:
    with pytest.raises(RequestError, match="Give a mapping"):
        GenerationRequest(arguments=None)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1"])
def test_seed_is_what_a_generator_takes(seed: object) -> None:
    with pytest.raises(RequestError, match="out of range"):
        GenerationRequest(seed=seed)


def test_requests_do_not_share_their_arguments() -> None:
    assert GenerationRequest().arguments is not GenerationRequest().arguments

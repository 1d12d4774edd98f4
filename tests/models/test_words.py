"""Words: equal for equal contents, and for no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.models.words import word_of

MAKERS: dict[str, Callable[[int], Any]] = {
    "number": lambda seed: seed,
    "float": float,
    "text": str,
    "dtype": lambda seed: (torch.float32, torch.float16)[seed],
    "device": lambda seed: torch.device(("cpu", "meta")[seed]),
    "tensor": lambda seed: torch.arange(6.0).reshape(2, 3).T + seed,
    "one number in a tensor": lambda seed: torch.tensor(seed),
    "bits": lambda seed: torch.tensor([True, bool(seed)]),
    "short floats": lambda seed: torch.full((3,), seed, dtype=torch.bfloat16),
    "array": lambda seed: np.arange(6.0).reshape(2, 3).T + seed,
    "number of numpy": lambda seed: np.float32(seed),
    "picture": lambda seed: Image.new("RGB", (3, 2), (seed, 0, 0)),
    "list": lambda seed: [1, ("a", torch.tensor([seed]))],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_contents_are_told_apart(kind: str) -> None:
    first, again, other = (word_of(MAKERS[kind](seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({first, again, other}) == 2


def test_kinds_and_forms_are_told_apart() -> None:
    alike = [
        None,
        0,
        0.0,
        False,
        "0",
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        np.zeros(4, np.float32),
        torch.zeros(0),
        torch.zeros(0, 2),
        [0],
        (0,),
    ]
    assert len({word_of(value) for value in alike}) == len(alike)


@pytest.mark.parametrize(
    "value", [object(), print, {"a": 1}, [object()], np.array([object()]), torch.ones(1).to("meta")]
)
def test_nothing_stands_for_what_nobody_can_read(value: Any) -> None:
    assert word_of(value) is None

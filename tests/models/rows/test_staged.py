"""Reasons why classes cannot run in stages."""

from __future__ import annotations

import diffusers
import pytest

from penstock.models.rows.staged import ENTANGLED


@pytest.mark.parametrize("name", sorted(ENTANGLED))
def test_a_reason_is_of_a_class_and_ends_a_sentence(name: str) -> None:
    assert hasattr(diffusers, name)
    assert ENTANGLED[name].startswith("its ")
    assert not ENTANGLED[name].endswith(".")

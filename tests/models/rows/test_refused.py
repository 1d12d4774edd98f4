"""Reasons why classes cannot be split."""

from __future__ import annotations

import diffusers
import pytest

from penstock.models.rows.refused import REFUSED
from penstock.models.rows.table import ROWS


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_reason_is_of_a_class_without_row_and_ends_a_sentence(name: str) -> None:
    assert hasattr(diffusers, name)
    assert name not in ROWS
    assert REFUSED[name].split()[0] in ("it", "its", "each")
    assert not REFUSED[name].endswith(".")

"""Rows are of classes that diffusers has; `tests/distributed/sequence/test_blocks.py` proves each of them."""

from __future__ import annotations

import diffusers
import pytest

from penstock.models.rows import image
from penstock.models.rows.row import Layout


@pytest.mark.parametrize("name", sorted(image.ROWS))
def test_a_row_is_of_a_class_and_can_be_read(name: str) -> None:
    assert hasattr(diffusers, name)
    row = image.ROWS[name]
    given = {stream for stack in row.stacks for text in stack.gives for stream in Layout.of(text).streams}
    gathered = {stream for text in row.ends.values() for stream in Layout.of(text).streams}
    assert gathered <= given
    assert set(row.whole) <= given | {"txt"}

"""The notation of rows."""

from __future__ import annotations

import pytest

from penstock.models.rows.row import Layout, Row, StackRow


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("", Layout(())),
        ("img", Layout(("img",), 1)),
        ("img:0", Layout(("img",), 0)),
        ("img:-2", Layout(("img",), -2)),
        ("txt+img:2", Layout(("txt", "img"), 2)),
        ("img:1/4", Layout(("img",), 1, 4)),
        ("txt+img+aud", Layout(("txt", "img", "aud"))),
    ],
)
def test_layouts(text: str, layout: Layout) -> None:
    assert Layout.of(text) == layout


@pytest.mark.parametrize("text", ["Img", "img:", "img+", "+img", "img txt", "img:1/", "1", "img:x"])
def test_what_is_no_layout(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no layout\. Write streams and a dim"):
        Layout.of(text)


def test_attention_is_found_by_its_path_in_the_block_or_in_the_stack() -> None:
    first, second = StackRow("refiner", {"x": "img"}, ("img",)), StackRow("layers", {"x": "all"}, ("all",))
    row = Row((first, second), {r"refiner\.attn": "img", r"layers\.attn": "all", r"cross\.\d": ("img", "txt")})
    assert row.streams_of(first, "attn") == (("img",), ("img",))
    assert row.streams_of(second, "attn") == (("all",), ("all",))
    assert row.streams_of(second, "cross.1") == (("img",), ("txt",))
    assert row.streams_of(second, "cross") is None
    assert row.streams_of(second, "norm.attn") is None


def test_the_first_pattern_counts() -> None:
    stack = StackRow("blocks", {"x": "img"}, ("img",))
    row = Row((stack,), {"attn1": "img", r"attn\d": "txt+img"})
    assert row.patterns_of(stack, "attn1") == ["attn1", r"attn\d"]
    assert row.streams_of(stack, "attn1") == (("img",), ("img",))
    assert row.streams_of(stack, "attn2") == (("txt", "img"), ("txt", "img"))

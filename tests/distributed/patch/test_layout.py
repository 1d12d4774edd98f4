"""Where rows are: against the elements themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from penstock.distributed.patch.layout import Layout, Window, best_layout, even_layout, reshaped


def held(layout: Layout, shape: list[int], rank: int) -> set[int]:
    """Numbers of the elements that a rank holds of a tensor of a shape."""
    whole = torch.arange(math.prod(shape)).view(shape)
    begin, end = layout.ranges()[rank]
    grouped = whole.unflatten(layout.dim, (layout.outer, layout.rows, layout.inner))
    return set(grouped.narrow(layout.dim + 1, begin, end - begin).flatten().tolist())


@pytest.mark.parametrize(
    ("old", "dim", "new", "step"),
    [
        ([2, 3, 12, 5], 2, [2, 3, 60], 1),
        ([2, 3, 60], 2, [2, 3, 12, 5], 5),
        ([2, 3, 12, 5], 2, [6, 12, 5], 1),
        ([2, 3, 12, 5], 2, [2, 3, 6, 2, 5], 2),
        ([2, 3, 4, 12, 5], 3, [2, 3, 240], 1),
        ([2, 12, 4], 1, [24, 4], 1),
        ([1, 12, 4], 1, [48], 1),
        ([2, 3, 12, 5], 2, [2, 3, 2, 6, 5], 6),
        ([2, 3, 12, 5], 2, [2, 3, 1, 12, 5], 1),
        ([2, 3, 12, 5], 2, [3, 2, 12, 5], 1),
        ([2, 3, 12, 5], 2, [2, 3, 5, 12], None),
    ],
)
def test_a_view_keeps_each_rank_its_elements(old: list[int], dim: int, new: list[int], step: int | None) -> None:
    borders = [0, 4, 12] if old[dim] == 12 else [0, 20, 60]
    layout = Layout.of(dim, borders)
    found = reshaped(layout, old, new)
    if step is None:
        assert found is None
        return
    assert found is not None and found[1] == step
    for rank in range(2):
        assert held(found[0], new, rank) == held(layout.aligned(step), old, rank)


def test_there_and_back() -> None:
    layout = Layout.of(3, [0, 4, 12])
    merged, _ = reshaped(layout, [2, 3, 4, 12, 5], [2, 3, 240]) or (layout, 0)
    assert (merged.outer, merged.rows, merged.inner) == (4, 12, 5)
    assert reshaped(merged, [2, 3, 240], [2, 3, 4, 12, 5]) == (layout, 1)


@pytest.mark.parametrize("window", [(3, 1, 1, 1), (3, 2, 0, 1), (3, 2, 1, 1), (2, 2, 0, 1), (4, 2, 1, 1), (5, 1, 4, 2)])
@pytest.mark.parametrize("rows", [16, 17, 23])
def test_windows_need_the_rows_that_they_read(window: tuple[int, int, int, int], rows: int) -> None:
    found = Window(*window)
    made = found.borders([0, 7, rows])
    assert made[-1] == found.num_rows(rows)
    kernel, stride, padding, dilation = window
    for begin, end in itertools.pairwise(made):
        source = torch.zeros(1, 1, rows, requires_grad=True)
        out = F.conv1d(source, torch.ones(1, 1, kernel), stride=stride, padding=padding, dilation=dilation)
        (gradient,) = torch.autograd.grad(out[..., begin:end].sum(), source)
        read = gradient.flatten().nonzero().flatten().tolist()
        first, last = found.needs((begin, end))
        assert max(first, 0) <= read[0] and read[-1] < min(last, rows)


def test_rows_that_are_halved_stay_where_they_are() -> None:
    for window in (Window(3, 2, 0), Window(3, 2, 1), Window(2, 2), Window(4, 2, 1)):
        assert window.borders([0, 8, 17 if window == Window(3, 2, 0) else 16])[1] == 4
    assert Window(4, 2, 1).borders_transposed([0, 8, 16], 32) == [0, 16, 32]
    assert Window(3, 2, 1).borders_transposed([0, 8, 16], 32) == [0, 16, 32]


def test_the_layout_leaves_the_slowest_rank_the_least() -> None:
    assert best_layout((1, 3, 512, 512), 2, 64) == Layout(2, (0, 256, 512))
    assert best_layout((1, 4, 3, 19), 4, 64) == Layout(3, (0, 4, 9, 14, 19))
    assert best_layout((1, 4, 1, 3), 4, 64) is None
    assert best_layout((1, 4, 37), 2, 64) == Layout(2, (0, 18, 37))
    assert best_layout((4, 4), 2, 64) is None
    assert even_layout(2, 24, 3, 8).borders == (0, 8, 16, 24)
    assert Layout.of(2, [0, 3, 8]).aligned(4).borders == (0, 4, 8)

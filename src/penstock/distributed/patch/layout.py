"""Which rows of a tensor each rank holds: arithmetic on whole numbers, the same on every rank, without any exchange.

Owns how rows move where a tensor is reshaped, padded, and read through windows. Does not know tensors, or what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

Range = tuple[int, int]
"""From the first of some rows to the one behind the last."""


@dataclass(frozen=True)
class Layout:
    """How one dimension of a tensor is spread over ranks.

    The dimension's elements are `outer * rows * inner`: a rank holds its rows, whole, of each of the `outer` groups.

    Attributes:
        dim: which dimension.
        borders: rank r holds rows `borders[r]` up to `borders[r + 1]`; the last one is the number of rows.
        outer: groups of rows, where a dimension before was merged into this one.
        inner: elements of one row, where a dimension behind was merged into this one.
    """

    dim: int
    borders: tuple[int, ...]
    outer: int = 1
    inner: int = 1

    @classmethod
    def of(cls, dim: int, borders: Sequence[int], outer: int = 1, inner: int = 1) -> Self:
        """A layout in the one form in which equal ones compare equal."""
        if outer == 1:
            borders, inner = [border * inner for border in borders], 1
        return cls(dim, tuple(borders), outer, inner)

    @property
    def rows(self) -> int:
        """Rows of all ranks."""
        return self.borders[-1]

    @property
    def length(self) -> int:
        """Elements of the dimension."""
        return self.outer * self.rows * self.inner

    @property
    def is_plain(self) -> bool:
        """Whether the dimension's elements are the rows."""
        return self.outer == self.inner == 1

    @property
    def has_empty(self) -> bool:
        """Whether a rank holds no row."""
        return any(begin >= end for begin, end in self.ranges())

    def ranges(self) -> list[Range]:
        """The rows of each rank."""
        return list(pairwise(self.borders))

    def at(self, dim: int) -> Self:
        """The same, of another dimension."""
        return replace(self, dim=dim)

    def with_borders(self, borders: Sequence[int]) -> Self:
        """The same with other rows."""
        return replace(self, borders=tuple(borders))

    def aligned(self, multiple: int) -> Self:
        """The same with borders that are multiples, each moved to the nearest; the number of rows must be one."""
        return self.with_borders([(border + multiple // 2) // multiple * multiple for border in self.borders])


def even_layout(dim: int, num_rows: int, num_ranks: int, multiple: int = 1) -> Layout:
    """Rows shared out evenly.

    Args:
        dim: the dimension.
        num_rows: its length, a multiple of `multiple`.
        num_ranks: that share it.
        multiple: of which every border is one.
    """
    units = num_rows // multiple
    return Layout.of(dim, [units * rank // num_ranks * multiple for rank in range(num_ranks + 1)])


def best_layout(shape: Sequence[int], num_ranks: int, coarsest: int) -> Layout | None:
    """The layout of a picture or video that leaves the slowest rank the least, borders as coarse as that allows.

    Coarse borders stay whole numbers where an encoder halves the rows, so that nothing has to be moved.

    Args:
        shape: (batch, channels, ..., height, width); (batch, channels, length) for sound.
        num_ranks: that share it.
        coarsest: multiple, a power of two, above which borders need not be.

    Returns:
        None where ranks would be without rows.
    """
    found: list[tuple[float, int, int, Layout]] = []
    dims = range(max(2, len(shape) - 2), len(shape))
    for dim in dims:
        multiple = math.gcd(shape[dim], coarsest)
        while multiple >= 1:
            layout = even_layout(dim, shape[dim], num_ranks, multiple)
            most = max(end - begin for begin, end in layout.ranges())
            if not layout.has_empty:
                found.append((round(most * num_ranks / shape[dim], 1), -multiple, dim, layout))
            multiple //= 2
    return min(found, key=lambda item: item[:3])[3] if found else None


def reshaped(layout: Layout, old: Sequence[int], new: Sequence[int]) -> tuple[Layout, int] | None:
    """Where the rows are once a tensor is viewed with another shape.

    Args:
        layout: of the tensor.
        old: its shape.
        new: the other one, of as many elements.

    Returns:
        The layout, and the multiple that each border must be beforehand (1: no matter which): rows that become several
        dimensions go by whole ones of the first. None where the rows would not stay together.
    """
    before = math.prod(old[: layout.dim]) * layout.outer
    behind = math.prod(old[layout.dim + 1 :]) * layout.inner
    num_ranks = len(layout.borders) - 1
    found: list[tuple[int, int, int, int]] = []
    for dim, length in enumerate(new):
        outside, inside = math.prod(new[:dim]), math.prod(new[dim + 1 :])
        if not outside or not inside or before % outside:
            continue
        outer = before // outside
        if behind % inside == 0 and outer * layout.rows * (behind // inside) == length:
            found.append((1, dim, outer, behind // inside))
        elif inside % behind == 0:
            step = inside // behind
            if layout.rows % step == 0 and layout.rows // step >= num_ranks and outer * (layout.rows // step) == length:
                found.append((step, dim, outer, 1))
    if not found:
        return None
    step, dim, outer, inner = min(found)
    borders = [border // step for border in layout.aligned(step).borders]
    return Layout.of(dim, borders, outer, inner), step


@dataclass(frozen=True)
class Window:
    """How a convolution or a pooling reads rows.

    Attributes:
        kernel: rows that it reads for one.
        stride: rows between two readings.
        padding: rows in front of the first, and behind the last.
        dilation: rows between two that it reads for one.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Rows from the first to the last that it reads for one."""
        return self.dilation * (self.kernel - 1)

    def num_rows(self, num_rows: int) -> int:
        """How many rows come out."""
        return (num_rows + 2 * self.padding - self.reach - 1) // self.stride + 1

    def borders(self, borders: Sequence[int]) -> list[int]:
        """Which rows come out where: those whose window's middle is in a rank's rows."""
        most = self.num_rows(borders[-1])
        inner = [
            min(max(-(-(2 * border + 2 * self.padding - self.reach) // (2 * self.stride)), 0), most)
            for border in borders[1:-1]
        ]
        return [0, *inner, most]

    def needs(self, made: Range) -> Range:
        """The rows that are read for some; below 0 and beyond the end is padding."""
        first = made[0] * self.stride - self.padding
        return first, (made[1] - 1) * self.stride - self.padding + self.reach + 1

    def borders_transposed(self, borders: Sequence[int], num_rows: int) -> list[int]:
        """Which rows come out where, of a transposed convolution that makes `num_rows`."""
        shift = (self.reach + 1 - self.stride) // 2 - self.padding if num_rows != borders[-1] * self.stride else 0
        inner = [min(max(border * self.stride + shift, 0), num_rows) for border in borders[1:-1]]
        return [0, *inner, num_rows]

    def needs_transposed(self, made: Range, num_rows: int) -> Range:
        """The rows, of `num_rows`, that take part in some of a transposed convolution."""
        first = -(-(made[0] + self.padding - self.reach) // self.stride)
        last = (made[1] - 1 + self.padding) // self.stride
        return max(first, 0), min(last + 1, num_rows)

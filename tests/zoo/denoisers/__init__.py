"""Tiny denoisers with random weights, of 27 classes, for tests that compare one process with several.

Each depends on all of its blocks and all of its attention, lets its tokens see each other and reads its text. All
can be built with any number of heads:

    case = denoisers.CASES["flux"]
    denoiser = case.build(heads=3)
    (output,) = denoiser(**case.inputs("odd"))

Sizes: "even" (64 tokens, 8 of text), "odd" (45 and 7), "short" (64 and 1), "masked" (64; texts of 16 and 5, with
a mask) and "masked_odd" (45; 15 and 4). Where a class bends these figures, its arguments say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.zoo.denoisers import grid, image, kin, rare, rare_edit, rare_image, rare_sound, video
from tests.zoo.denoisers.case import SIZES, Case

CASES: Mapping[str, Case] = MappingProxyType(
    {
        case.name: case
        for kind in (image, video, kin, grid, rare, rare_image, rare_edit, rare_sound)
        for case in kind.CASES
    }
)
NAMES: tuple[str, ...] = tuple(CASES)

__all__ = ["CASES", "NAMES", "SIZES", "Case"]

"""Every class that has a row, split over 2, 4 and 8 ranks, is the same as on one."""

from __future__ import annotations

import pytest

from penstock.models.rows.table import ROWS, row_of
from tests.distributed.sequences import DEGREES, TOLERANCE, compare
from tests.ranks import run_ranks
from tests.zoo.denoisers import CASES

NAMES = [name for name, case in CASES.items() if row_of(case.build()) is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_split_denoiser_is_the_plain_one(name: str, world_size: int) -> None:
    for ulysses, ring in DEGREES[world_size]:
        for size in CASES[name].variants:
            measured = run_ranks(world_size, compare, name, ulysses, ring, size, 4)
            for split, local in measured:
                assert split < TOLERANCE, (ulysses, ring, size)
                assert local > 10 * TOLERANCE, (ulysses, ring, size)

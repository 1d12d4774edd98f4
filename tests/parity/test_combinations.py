"""The full product of splits and streaming: the same picture, or a refusal that names what would work."""

from __future__ import annotations

import pytest

from tests.parity.combinations import try_all, ways
from tests.ranks import run_ranks


@pytest.mark.parametrize(("name", "world_size"), [("wan", 2), ("flux", 4), ("wan", 8)])
def test_every_product_of_degrees_works_or_is_refused(name: str, world_size: int) -> None:
    ranks = run_ranks(world_size, try_all, name, world_size, timeout_s=600)
    assert len(ranks[0]) == len(list(ways(world_size)))
    assert {outcome.is_streamed for outcome in ranks[0] if outcome.is_sharded} == {True, False}
    for outcomes in ranks:
        for outcome in outcomes:
            if outcome.share is None:
                assert outcome.refusal.endswith("."), outcome
                assert any(size > 4 or axis == "pipeline_parallel_size" for axis, size in outcome.degrees), outcome
            else:
                assert outcome.share < 1, outcome
    assert sum(outcome.share is not None for outcome in ranks[0]) > len(ranks[0]) // 2

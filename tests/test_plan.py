"""Plans as JSON, and what follows from their numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from penstock.plan import ComponentPlan, Plan, UnitPlan

FIRST = UnitPlan(name="transformer.blocks.0", component="transformer", num_bytes=100, begin=50, residency="resident")
PLAN = Plan(
    offload="layerwise",
    device="cpu",
    prefetch=1,
    weight_bytes=400,
    arena_bytes=250,
    fixed_bytes=12,
    budget_bytes=None,
    least_bytes=250,
    components=(
        ComponentPlan(name="transformer", role="denoiser", num_bytes=300, device_bytes=200, num_resident=1,
                      num_streamed=2, num_slots=2),
        ComponentPlan(name="vae", role="autoencoder", num_bytes=100, device_bytes=100),
    ),
    units=(FIRST, replace(FIRST, name="transformer.blocks.1", begin=150, residency="streamed", slot=0)),
    reason="auto: »naïve«\nreason",
)  # fmt: skip


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, budget_bytes=300, units=(), components=())])
def test_json_is_one_line_and_leads_back(plan: Plan) -> None:
    text = plan.to_json()
    assert "\n" not in text
    assert Plan.from_json(text) == plan


def test_json_says_what_the_plan_says() -> None:
    told = json.loads(PLAN.to_json())
    assert told["units"][1] == {"name": "transformer.blocks.1", "component": "transformer", "num_bytes": 100,
                                "begin": 150, "residency": "streamed", "slot": 0}  # fmt: skip
    assert (told["budget_bytes"], told["components"][1]["role"]) == (None, "autoencoder")


def test_what_is_promised_is_the_arena_and_what_lies_beside_it() -> None:
    assert PLAN.promised_bytes == 262


@pytest.mark.parametrize(
    ("begin", "num_bytes", "is_overlap"),
    [(0, 50, False), (0, 51, True), (149, 1, True), (150, 9, False), (60, 10, True), (0, 999, True)],
)
def test_units_overlap_where_they_share_a_byte(begin: int, num_bytes: int, is_overlap: bool) -> None:
    other = replace(FIRST, name="other", begin=begin, num_bytes=num_bytes)
    assert FIRST.overlaps(other) == other.overlaps(FIRST) == is_overlap
    assert other.end == begin + num_bytes

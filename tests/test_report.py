"""Reports: for people, and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from penstock.plan import Plan
from penstock.report import Report, TrafficReport, UnitReport, ZeroStall
from tests.test_plan import PLAN

STALL = ZeroStall(
    component="transformer", compute_s=0.0105, fill_s=0.02, num_blocks=3, num_resident=2, budget_bytes=280
)
TRAFFIC = TrafficReport(axis="ulysses", operation="all_to_all", num_calls=4, received_bytes=3072)
REPORT = Report(
    plan=replace(PLAN, weight_bytes=3 * 1024, reason="as asked for"),
    units=(UnitReport(name="vae", num_bytes=100, residency="turn", slot=None, source="file+host"),),
    notes=("first", "second"),
    read_bytes=2048,
    moved_bytes=4096,
    saved_bytes=5120,
    peak_bytes=262,
    fill_s=1.239,
    exposed_wait_s=0.5,
    num_fills=7,
    num_demanded=1,
    zero_stall=(STALL,),
    split="ulysses(2)",
    rank=1,
    traffic=(TRAFFIC,),
)


def test_a_report_reads_as_sentences() -> None:
    assert str(REPORT).splitlines() == [
        "offload layerwise on cpu (as asked for)",
        "weights 3 KiB, promised at most 262 B on the device, peak 262 B; least possible 250 B",
        "  transformer (denoiser): 300 B, 200 B on the device while it runs, 1 blocks resident, 2 streamed through 2 "
        "slots",
        "  vae (autoencoder): 100 B, 100 B on the device while it runs",
        "read 2 KiB, moved 4 KiB in 7 fills (1 on demand), 1.24 s of filling, 0.50 s waited for",
        "saved 5 KiB of moves: calls of one step shared their blocks",
        "split ulysses(2), this is rank 1",
        "  ulysses: 4 all_to_all, 3 KiB received",
        "  transformer: a block computes for 10.5 ms and fills in 20.0 ms; with 2 of 3 blocks resident compute would "
        "not wait: max_weight_memory=280",
        "note: first",
        "note: second",
    ]


def test_what_was_not_measured_is_not_told() -> None:
    assert len(str(replace(REPORT, saved_bytes=0, zero_stall=(), notes=(), split="", traffic=())).splitlines()) == 5


def test_json_is_one_line_with_all_of_it() -> None:
    text = REPORT.to_json()
    assert "\n" not in text
    told = json.loads(text)
    assert Plan.from_json(json.dumps(told.pop("plan"))) == REPORT.plan
    (unit,), (stall,) = told.pop("units"), told.pop("zero_stall")
    assert UnitReport(**unit) == REPORT.units[0]
    assert ZeroStall(**stall) == STALL
    (traffic,) = told.pop("traffic")
    assert TrafficReport(**traffic) == TRAFFIC
    told["notes"] = tuple(told["notes"])
    assert Report(plan=REPORT.plan, units=REPORT.units, zero_stall=(STALL,), traffic=(TRAFFIC,), **told) == REPORT


def test_a_summary_is_what_was_promised_and_measured_without_the_units() -> None:
    told = json.loads(json.dumps(REPORT.summary()))
    assert "units" not in told
    assert (told["offload"], told["promised_bytes"], told["least_bytes"], told["peak_bytes"]) == (
        "layerwise", 262, 250, 262,
    )  # fmt: skip
    assert told["components"][0]["num_slots"] == 2
    assert told["notes"] == ["first", "second"]

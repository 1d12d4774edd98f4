"""What goes with what, found out by running it; `docs/compatibility.md` is what was found.

`make compatibility` runs every cell and writes the page. Without it the test fails where the page says something else:
then every combination is placed, and they take turns in being run, which most tests of this folder do as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.config import ParallelConfig
from penstock.errors import ConfigError
from penstock.models.rows.refused import REFUSED
from tests import zoo
from tests.distributed.sequences import CASES
from tests.parity.combinations import HEADS, STREAMED, Guided
from tests.ranks import RankError, run_ranks
from tests.tolerance import difference, tolerance_of, tolerance_of_pipeline
from tests.turns import IS_THOROUGH

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
PIPELINE = "qwen_image"

FEATURES: dict[str, dict[str, Any]] = {
    "sequential": {"offload": "sequential"},
    "layerwise": STREAMED,
    "HSDP": {"use_hsdp": True, "hsdp_shard_size": 2},
    "data": {"data_parallel_size": 2},
    "CFG": {"cfg_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "Ring": {"ring_degree": 2},
    "Ulysses": {"ulysses_degree": 2},
    "tensor": {"tensor_parallel_size": 2},
    "VAE": {"vae_patch_parallel_size": 2},
}
WRITES = bool(os.environ.get("PENSTOCK_WRITE_PAGES"))
TURN = 1 if WRITES or IS_THOROUGH else 4
OF_DENOISERS = ("pipeline", "Ring", "Ulysses", "tensor")  # the others ask nothing of a class


def placed(pipeline: Any, features: Mapping[str, Any]) -> Any:
    """Places a pipeline with some features, degrees and options mixed."""
    degrees = {name: value for name, value in features.items() if isinstance(value, int)}
    options = {name: value for name, value in features.items() if name not in degrees}
    return penstock.apply(pipeline, parallel=ParallelConfig(**degrees), device="cpu", **{"offload": "none", **options})


def world_size(features: Mapping[str, Any]) -> int:
    return ParallelConfig(**{name: value for name, value in features.items() if isinstance(value, int)}).world_size


def try_pairs(pairs: list[tuple[str, str]]) -> list[str]:
    """On every rank: what each pair of features does to a whole pipeline."""
    with torch.inference_mode():
        plain = zoo.tensors(zoo.run(zoo.build(PIPELINE), PIPELINE))
    found = []
    for number, (one, other) in enumerate(pairs):
        pipeline = zoo.build(PIPELINE)
        try:
            handle = placed(pipeline, {**FEATURES[one], **FEATURES[other]})
        except ConfigError as error:
            found.append(str(error))
            continue
        if number % TURN == 0:
            with torch.inference_mode():
                result = zoo.tensors(zoo.run(pipeline, PIPELINE))
            assert difference(result, plain) < tolerance_of_pipeline(PIPELINE), (one, other)
        handle.remove()
        found.append("")
    return found


def try_denoiser(name: str, number: int) -> tuple[str, list[str]]:
    """On every rank of two: its class, and what each feature does to it; a number says whose turn it is."""
    case = CASES[name]
    size = case.variants[min(1, len(case.variants) - 1)]
    stock = Guided(case.build(heads=HEADS))
    plain = stock(case.inputs(size), case.streams)
    allowed = tolerance_of(stock.transformer, lambda: stock(case.inputs(size), case.streams), plain)
    found = []
    for turn, feature in enumerate(OF_DENOISERS):
        pipeline = Guided(case.build(heads=HEADS))
        try:
            handle = placed(pipeline, FEATURES[feature])
        except ConfigError as error:
            found.append(str(error))
            continue
        if (number + turn) % TURN == 0:
            result = pipeline(case.inputs(size), case.streams)
            assert difference(result, plain) < allowed, feature
        handle.remove()
        found.append("")
    return type(pipeline.transformer).__name__, found


def pairs_table() -> list[str]:
    pairs = list(combinations_with_replacement(FEATURES, 2))
    cells: dict[tuple[str, str], str] = {}
    by_size: dict[int, list[tuple[str, str]]] = {}
    for one, other in pairs:
        by_size.setdefault(world_size({**FEATURES[one], **FEATURES[other]}), []).append((one, other))
    for size, members in sorted(by_size.items()):
        ranks = run_ranks(size, try_pairs, members, timeout_s=600)
        assert all(found == ranks[0] for found in ranks)
        cells.update(zip(members, ranks[0], strict=True))
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for row, one in enumerate(FEATURES):
        words = []
        for column, other in enumerate(FEATURES):
            pair = (one, other) if row <= column else (other, one)
            exclusive = {one, other} == {"sequential", "layerwise"}
            words.append("one of them" if exclusive else "no" if cells[pair] else "yes")
        lines.append(f"| {one} | " + " | ".join(words) + " |")
    return lines


def denoisers_table() -> list[str]:
    rows: dict[str, list[str]] = {}
    failures = []
    names = {type(case.build()).__name__: name for name, case in reversed(CASES.items())}.values()
    for number, name in enumerate(names):
        try:
            ranks = run_ranks(2, try_denoiser, name, number, timeout_s=300)
        except RankError as error:
            failures.append(f"{name}: {error}")
            continue
        assert ranks[0] == ranks[1]
        owner, found = ranks[0]
        rows[owner] = found
    assert not failures, "\n\n".join(failures)
    lines = ["| denoiser | " + " | ".join(OF_DENOISERS) + " |", "|---" * (len(OF_DENOISERS) + 1) + "|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for owner in sorted(rows):
        words = []
        for feature, refusal in zip(OF_DENOISERS, rows[owner], strict=True):
            words.append("no" if refusal else "yes")
            if refusal:
                reasons.setdefault((feature, refusal.replace(owner, "it")), []).append(f"`{owner}`")
        lines.append(f"| {owner} | " + " | ".join(words) + " |")
    listed = [f"- {feature}: {', '.join(owners)}: {reason}" for (feature, reason), owners in sorted(reasons.items())]
    return [
        *lines,
        "",
        "### Why not",
        "",
        "What these tiny models are refused, in the words of the error.",
        "",
        *listed,
    ]


def refused_table() -> list[str]:
    lines = ["| class | why its tokens are not split |", "|---|---|"]
    return [*lines, *(f"| {owner} | {reason} |" for owner, reason in sorted(REFUSED.items()))]


@pytest.mark.thorough
def test_the_page_says_what_the_tests_found() -> None:
    page = "\n".join(
        [
            "# What goes with what",
            "",
            "Written by `tests/parity/test_compatibility.py`, which runs every cell on gloo ranks and compares it with",
            "the plain run (float32, within what `tests/tolerance.py` measures); change nothing here by hand, run",
            "`make compatibility`.",
            "",
            "## Features with each other",
            "",
            "A whole pipeline with two features at a time, each over two ranks. The full product of all degrees on 2,",
            "4 and 8 ranks, with weights resident, streamed and sharded, is `tests/parity/test_combinations.py`.",
            "",
            *pairs_table(),
            "",
            "## Denoisers",
            "",
            "Tiny models of the stock classes, two steps with two calls of guidance each, on two ranks. Streaming and",
            "CFG ask nothing of a class.",
            "",
            *denoisers_table(),
            "",
            "### Never",
            "",
            "Ulysses and Ring are refused for these classes; CFG, streaming and the VAE's tiles are not.",
            "",
            *refused_table(),
            "",
        ]
    )
    if WRITES:
        PAGE.write_text(page, "utf-8")
    assert PAGE.is_file() and PAGE.read_text("utf-8") == page, "run `make compatibility`"

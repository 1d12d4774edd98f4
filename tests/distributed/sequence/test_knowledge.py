"""Whose knowledge of a denoiser's sequences counts."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from penstock.config import ParallelConfig
from penstock.distributed.mesh import build_mesh
from penstock.distributed.sequence.knowledge import apply_sequences, check_sequences
from penstock.distributed.sequence.plan import sequence_plan_of
from penstock.errors import ConfigError, DeclarationError
from tests.distributed.sequences import difference, run
from tests.ranks import run_ranks
from tests.tolerance import tolerance_of
from tests.zoo.denoisers import CASES

TWO = ParallelConfig(ulysses_degree=2)


class Stranger(nn.Module):
    """Nothing is known of it."""


def declare(model: nn.Module, plan: Any) -> None:
    """Gives a model a class of its own that declares a plan."""
    model.__class__ = type("Declared", (type(model),), {"_sp_plan": plan})


def test_a_stranger_is_refused() -> None:
    with pytest.raises(ConfigError, match="the sequence of Stranger cannot be split over 2 ranks: it has no row"):
        check_sequences(Stranger(), TWO)


def test_what_cannot_be_split_is_refused_with_the_reason() -> None:
    sana = type("SanaTransformer2DModel", (Stranger,), {"_cp_plan": {}})()
    with pytest.raises(ConfigError, match="convolution"):
        check_sequences(sana, TWO)


def test_a_declared_plan_is_checked() -> None:
    model = CASES["wan"].build()
    declare(model, {"blocks.0": "hidden_states"})
    with pytest.raises(DeclarationError, match="the plan of Declared breaks a rule"):
        check_sequences(model, TWO)


def test_a_plan_of_the_model_alone_is_checked_too() -> None:
    model = CASES["wan"].build()
    model._sp_plan = {"blocks.0": "hidden_states"}
    with pytest.raises(DeclarationError, match="the plan of WanTransformer3DModel breaks a rule"):
        check_sequences(model, TWO)


def split_by(is_declared: bool) -> tuple[float, float, int]:
    model = CASES["wan"].build()
    inputs = CASES["wan"].inputs("even")
    plain = run(model, inputs)
    allowed = tolerance_of(model, lambda: run(model, inputs), plain)
    if is_declared:
        declare(model, sequence_plan_of(model))  # diffusers' own, as if its author had written it for penstock
    mesh = build_mesh(TWO, "cpu")
    mesh["ulysses"].traffic.clear()
    check_sequences(model, TWO)
    undo = apply_sequences(model, mesh)
    result = difference(run(model, inputs), plain)
    undo.run()
    assert difference(run(model, inputs), plain) == 0
    return result, allowed, mesh["ulysses"].traffic.num_calls["all_to_all"]


def test_the_classes_own_plan_comes_before_the_row() -> None:
    for (by_row, allowed, row_calls), (by_plan, _, plan_calls) in zip(
        run_ranks(2, split_by, False), run_ranks(2, split_by, True), strict=True
    ):
        assert by_row < allowed and by_plan < allowed
        assert row_calls == plan_calls > 0


def test_no_row_and_no_reason_leave_diffusers_plan() -> None:
    known = type("Fresh", (nn.Module,), {"_cp_plan": {"": {}}})()
    check_sequences(known, TWO)

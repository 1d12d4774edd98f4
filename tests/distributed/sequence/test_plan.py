"""The notation of declared plans: every rule, and diffusers' own notation read as this one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import diffusers
import pytest
from torch import nn

from penstock.distributed import (
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from penstock.distributed.sequence.plan import inputs_of, outputs_of, sequence_plan_of

SPLIT = SequenceParallelInput(split_dim=1)
SPLIT_OUTPUT = SequenceParallelInput(split_dim=1, split_output=True)
GATHER = SequenceParallelOutput(gather_dim=1)


def in_group(name: str) -> SequenceParallelInput:
    return SequenceParallelInput(split_dim=1, auto_pad=True, shard_group=name)


def test_defaults_are_those_of_the_interface() -> None:
    assert SequenceParallelInput(1, None, False, False, None) == SPLIT
    assert SequenceParallelOutput(1, None, None) == GATHER
    assert SequenceParallelPartialInput(0, 7) == SequenceParallelPartialInput(0, 7, None, False)


@pytest.mark.parametrize("spec", [SPLIT, GATHER, SequenceParallelPartialInput(0, "text")])
def test_specs_are_frozen_and_hash(spec: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.expected_dims = 3
    assert hash(spec) == hash(dataclasses.replace(spec))


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"": {"hidden_states": SPLIT}, "proj_out": GATHER},
        {"rope": {0: SPLIT_OUTPUT, 1: SequenceParallelPartialInput(0, 4, split_output=True)}},
        {"blocks.0": {"x": [SPLIT, SPLIT]}, "blocks.*": {"mask": SPLIT}, "out": [GATHER, GATHER]},
        {"a.b": {"x": (SPLIT, SequenceParallelPartialInput(0, "text"))}, "out": (GATHER,)},
        {"": {"x": in_group("image"), "ids": in_group("image"), "y": in_group("text")}},
        {"": {"x": in_group("image")}, "out": SequenceParallelOutput(1, shard_group="image")},
    ],
)
def test_what_the_notation_can_say(plan: SequenceParallelModelPlan) -> None:
    assert validate_sp_plan(plan) is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "A plan of type NoneType"),
        ([("", {"x": SPLIT})], "A plan of type list"),
        ({0: {"x": SPLIT}}, "Key 0 of a plan is no module path"),
        ({None: GATHER}, "Key None of a plan"),
        ({"out": SPLIT}, r"plan\['out'\] is of type SequenceParallelInput: neither"),
        ({"out": "gather"}, r"plan\['out'\] is of type str"),
        ({"out": None}, r"plan\['out'\] is of type NoneType"),
        ({"out": []}, r"plan\['out'\] is of type list"),
        ({"out": [GATHER, SPLIT]}, r"plan\['out'\] is of type list"),
        ({"": {"x": GATHER}}, r"plan\[''\]\['x'\] is of type SequenceParallelOutput"),
        ({"": {"x": 1}}, r"plan\[''\]\['x'\] is of type int"),
        ({"": {"x": []}}, r"plan\[''\]\['x'\] is of type list"),
        ({"": {"x": [SPLIT, None]}}, r"plan\[''\]\['x'\] is of type list"),
        ({"": {1.5: SPLIT}}, r"plan\[''\]\[1.5\]: the key is neither"),
        ({"": {True: SPLIT_OUTPUT}}, r"plan\[''\]\[True\]: the key is neither"),
        ({"rope": {0: SPLIT}}, r"plan\['rope'\]\[0\]: an index means an output. Give it split_output=True."),
        ({"rope": {0: SequenceParallelPartialInput(0, 4)}}, r"plan\['rope'\]\[0\]: an index means an output"),
        ({"rope": {0: [SPLIT_OUTPUT]}}, r"plan\['rope'\]\[0\] is of type list: one output"),
        ({"rope": {0: GATHER}}, r"plan\['rope'\]\[0\] is of type SequenceParallelOutput"),
        ({"": {"x": SPLIT_OUTPUT}}, r"plan\[''\]\['x'\]: a name means an input"),
        ({"a": {"x": in_group("g")}, "b": {"x": in_group("g")}}, "shard_group 'g' is split at 'a' and at 'b'"),
    ],
)
def test_what_it_cannot(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_sp_plan(plan)


class Declared(nn.Module):
    _sp_plan: ClassVar[Any] = {"": {"x": SPLIT}, "out": GATHER}


class Both(Declared):
    _cp_plan: ClassVar[Any] = {"": {"y": SPLIT}}


class Wrong(nn.Module):
    _sp_plan: ClassVar[Any] = {"rope": {0: SPLIT}}


class Empty(nn.Module):
    _sp_plan: ClassVar[Any] = {}


def test_a_models_plan_is_checked() -> None:
    assert get_sp_plan_from_model(Declared()) is Declared._sp_plan
    assert get_sp_plan_from_model(Empty()) == {}
    assert get_sp_plan_from_model(nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="an index means an output"):
        get_sp_plan_from_model(Wrong())


def test_the_sp_plan_comes_first() -> None:
    assert sequence_plan_of(Both()) is Declared._sp_plan
    assert sequence_plan_of(nn.Linear(1, 1)) is None


def classes_with_plans() -> list[type[nn.Module]]:
    found = [
        getattr(diffusers, name)
        for name in dir(diffusers)
        if name.endswith(("Transformer2DModel", "Transformer3DModel"))
    ]
    return [one for one in found if getattr(one, "_cp_plan", None)]


def test_every_plan_of_diffusers_can_be_read() -> None:
    classes = classes_with_plans()
    assert {"FluxTransformer2DModel", "WanTransformer3DModel"} <= {one.__name__ for one in classes}
    for one in classes:
        model = one.__new__(one)
        nn.Module.__init__(model)
        plan = sequence_plan_of(model)
        assert plan is not None
        assert plan.keys() == one._cp_plan.keys()


def test_diffusers_splits_may_be_padded() -> None:
    model = diffusers.WanTransformer3DModel.__new__(diffusers.WanTransformer3DModel)
    nn.Module.__init__(model)
    plan = sequence_plan_of(model)
    assert plan is not None
    assert plan["rope"] == {index: SequenceParallelInput(1, 4, split_output=True, auto_pad=True) for index in (0, 1)}
    assert plan["blocks.0"] == {"hidden_states": SequenceParallelInput(1, 3, auto_pad=True)}
    assert plan["proj_out"] == SequenceParallelOutput(1, 3)


def test_one_and_several_read_alike() -> None:
    assert inputs_of(SPLIT) == inputs_of([SPLIT]) == (SPLIT,)
    assert outputs_of(GATHER) == outputs_of((GATHER,)) == (GATHER,)
    assert inputs_of(GATHER) == inputs_of("x") == outputs_of([SPLIT]) == ()

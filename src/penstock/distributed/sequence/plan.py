"""Where a model's sequence is split and gathered, as its class declares it.

    _sp_plan = {
        "rope": {0: SequenceParallelInput(split_dim=1, split_output=True)},
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

Owns the notation, its rules, and diffusers' `_cp_plan` read as this. Does not know ranks, or how a plan is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split a tensor before, or after, a module runs.

    Attributes:
        split_dim: dim along which the tokens lie.
        expected_dims: number of dims; a tensor with another number stays whole, with a warning.
        split_output: split what the module returns in place of what it takes.
        auto_pad: pad to a multiple of the number of ranks; the padding never reaches the result.
        shard_group: name by which an output refers to this sequence.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False
    shard_group: str | None = None


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather what a module returns.

    Attributes:
        gather_dim: dim along which the tokens lie.
        expected_dims: number of dims; a tensor with another number is left as it is, with a warning.
        shard_group: name of the sequence that it is the result of.
    """

    gather_dim: int
    expected_dims: int | None = None
    shard_group: str | None = None


@dataclass(frozen=True)
class SequenceParallelPartialInput:
    """Split the second part of a tensor that holds text and then image along one dim; the text stays whole.

    Attributes:
        split_dim: dim along which the tokens lie.
        text_len_source: a parameter of the module's forward, whose sequence length is that of the text; or a number.
        expected_dims: number of dims; a tensor with another number stays whole, with a warning.
        split_output: split what the module returns in place of what it takes.
    """

    split_dim: int
    text_len_source: str | int
    expected_dims: int | None = None
    split_output: bool = False


AnySequenceParallelInput = SequenceParallelInput | SequenceParallelPartialInput

SequenceParallelInputType = dict[
    str | int, AnySequenceParallelInput | list[AnySequenceParallelInput] | tuple[AnySequenceParallelInput, ...]
]
"""By parameter of a module's forward, or by index of what it returns: how that is split."""

SequenceParallelOutputType = SequenceParallelOutput | list[SequenceParallelOutput] | tuple[SequenceParallelOutput, ...]
"""How what a module returns is gathered; one per returned tensor."""

SequenceParallelModelPlan = dict[str, SequenceParallelInputType | SequenceParallelOutputType]
"""By module (`""`, `"a.b"`, `"blocks.*"`): what is split or gathered there."""

_INPUTS = (SequenceParallelInput, SequenceParallelPartialInput)


def validate_sp_plan(plan: Any) -> None:
    """Check a plan against the rules of the notation.

    Raises:
        ValueError: for the first rule that it breaks, naming the place.
    """
    if not isinstance(plan, dict):
        raise ValueError(f"A plan of type {type(plan).__name__} has no modules: it is a dict from modules to splits.")
    homes: dict[str, str] = {}
    for module, spec in plan.items():
        if not isinstance(module, str):
            raise ValueError(f"Key {module!r} of a plan is no module path. Write '', 'a.b' or 'blocks.*'.")
        if isinstance(spec, dict):
            _check_inputs(module, spec)
        elif not outputs_of(spec):
            raise ValueError(
                f"plan[{module!r}] is of type {type(spec).__name__}: neither a dict of inputs to split, nor one or "
                "several SequenceParallelOutput to gather. Give one of these."
            )
        for name in _shard_groups(spec):
            if homes.setdefault(name, module) != module:
                raise ValueError(
                    f"shard_group {name!r} is split at {homes[name]!r} and at {module!r}: a name stands for one "
                    "sequence. Give each module a name of its own."
                )


def get_sp_plan_from_model(model: nn.Module) -> SequenceParallelModelPlan | None:
    """The `_sp_plan` of a model, checked; None where it declares none.

    Raises:
        ValueError: for a plan that breaks a rule.
    """
    plan: SequenceParallelModelPlan | None = getattr(model, "_sp_plan", None)
    if plan is not None:
        validate_sp_plan(plan)
    return plan


def sequence_plan_of(model: nn.Module) -> SequenceParallelModelPlan | None:
    """What a model declares: its `_sp_plan`, else diffusers' `_cp_plan` read as one; None where there is neither.

    diffusers' splits may be padded: what it refuses as not divisible is split here.

    Raises:
        ValueError: for a plan that breaks a rule.
    """
    plan = get_sp_plan_from_model(model)
    declared = getattr(model, "_cp_plan", None)
    if plan is not None or declared is None:
        return plan
    converted: SequenceParallelModelPlan = _converted(declared)
    validate_sp_plan(converted)
    return converted


def inputs_of(spec: Any) -> tuple[AnySequenceParallelInput, ...]:
    """The inputs of one value of an input spec; empty where it is none, or holds anything else."""
    several = tuple(spec) if isinstance(spec, (list, tuple)) else (spec,)
    return several if all(isinstance(one, _INPUTS) for one in several) else ()


def outputs_of(spec: Any) -> tuple[SequenceParallelOutput, ...]:
    """The outputs of one value of a plan; empty where it is none, or holds anything else."""
    several = tuple(spec) if isinstance(spec, (list, tuple)) else (spec,)
    return several if all(isinstance(one, SequenceParallelOutput) for one in several) else ()


def _check_inputs(module: str, spec: dict[Any, Any]) -> None:
    for key, value in spec.items():
        place = f"plan[{module!r}][{key!r}]"
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise ValueError(f"{place}: the key is neither a parameter's name nor an output's index. Give one of them.")
        if isinstance(key, int):
            if not isinstance(value, _INPUTS):
                raise ValueError(
                    f"{place} is of type {type(value).__name__}: one output is split by one SequenceParallelInput or "
                    "SequenceParallelPartialInput. Give one."
                )
            if not value.split_output:
                raise ValueError(f"{place}: an index means an output. Give it split_output=True.")
        elif not inputs_of(value):
            raise ValueError(
                f"{place} is of type {type(value).__name__}: a parameter is split by one or several "
                "SequenceParallelInput or SequenceParallelPartialInput. Give these."
            )
        elif any(one.split_output for one in inputs_of(value)):
            raise ValueError(f"{place}: a name means an input. For an output, give its index.")


def _shard_groups(spec: Any) -> Iterator[str]:
    if isinstance(spec, dict):
        for value in spec.values():
            for one in inputs_of(value):
                if isinstance(one, SequenceParallelInput) and one.shard_group is not None:
                    yield one.shard_group


def _converted(declared: Any) -> Any:
    if isinstance(declared, dict):
        return {key: _converted(value) for key, value in declared.items()}
    if isinstance(declared, (list, tuple)):
        return [_converted(value) for value in declared]
    if isinstance(declared, ContextParallelInput):
        return SequenceParallelInput(declared.split_dim, declared.expected_dims, declared.split_output, auto_pad=True)
    if isinstance(declared, ContextParallelOutput):
        return SequenceParallelOutput(declared.gather_dim, declared.expected_dims)
    return declared

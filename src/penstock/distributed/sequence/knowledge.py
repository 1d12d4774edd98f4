"""What is known of a denoiser's sequences, and from whom: its own `_sp_plan`, our row, diffusers' `_cp_plan`.

Owns which of these is carried out. Does not know how.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from penstock.config import ParallelConfig
from penstock.distributed.mesh import Mesh
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.distributed.sequence.declared import apply_declared, check_declared
from penstock.distributed.sequence.plan import SequenceParallelModelPlan, sequence_plan_of
from penstock.errors import DeclarationError
from penstock.models.rows.table import reason_of, row_of
from penstock.undo import Undo

_RESIDUALS = re.compile(r"control|residual|block_samples|adapter")


def check_sequences(denoiser: nn.Module, config: ParallelConfig) -> None:
    """Refuse a denoiser whose sequences cannot be split.

    Args:
        denoiser: a model, perhaps without storage (on the meta device).
        config: of which the degrees of the sequence are used.

    Raises:
        ConfigError: for a class that cannot be split, or of which nothing is known.
        DeclarationError: for a plan or row that does not fit its class.
    """
    try:
        plan = _plan_of(denoiser)
        if plan is not None:
            check_declared(denoiser, plan)
            return
    except ValueError as error:
        raise DeclarationError(f"the plan of {type(denoiser).__name__} breaks a rule: {error}") from error
    check_sequence(denoiser, config)


def knows_sequences(denoiser: nn.Module) -> bool:
    """Whether a row or a plan says how the sequences of a denoiser's class are split."""
    return row_of(denoiser) is not None or _plan_of(denoiser) is not None


def entries_between_blocks(denoiser: nn.Module) -> tuple[str, ...]:
    """The arguments by which results of another model enter a denoiser between its blocks, and are cut.

    Args:
        denoiser: of which a row or a plan is known.

    Returns:
        Those that the row names as residuals, or those that the plan splits and that are named as residuals are.
    """
    plan = _plan_of(denoiser)
    if plan is None:
        row = row_of(denoiser)
        return () if row is None else tuple(row.residuals)
    specs = [spec for spec in plan.values() if isinstance(spec, Mapping)]
    names = dict.fromkeys(name for spec in specs for name in spec if isinstance(name, str))
    return tuple(name for name in names if _RESIDUALS.search(name))


def apply_sequences(denoiser: nn.Module, mesh: Mesh, others: Sequence[nn.Module] = ()) -> Undo:
    """Split the sequences of a denoiser over a mesh's ring and Ulysses ranks.

    Args:
        denoiser: that `check_sequences` has passed.
        mesh: whose `ring` and `ulysses` axes are used.
        others: models that run by themselves, and may have modules in common with the denoiser. They run whole.
    """
    if mesh["sequence"].size == 1:
        return Undo()
    plan = _plan_of(denoiser)
    if plan is not None:
        return apply_declared(denoiser, plan, mesh)
    row = row_of(denoiser)
    assert row is not None  # checked, when all blocks were there
    return apply_sequence(denoiser, row, mesh, others)


def _plan_of(denoiser: nn.Module) -> SequenceParallelModelPlan | None:
    """The plan to carry out; None where a row is better, or nothing is known."""
    if getattr(denoiser, "_sp_plan", None) is not None or _has_only_a_plan(denoiser):
        return sequence_plan_of(denoiser)
    return None


def _has_only_a_plan(denoiser: nn.Module) -> bool:
    return row_of(denoiser) is None and reason_of(denoiser) is None

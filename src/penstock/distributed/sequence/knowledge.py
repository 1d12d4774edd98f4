"""What is known of a denoiser's sequences, and from whom: its own `_sp_plan`, our row, diffusers' `_cp_plan`.

Owns which of these is carried out. Does not know how.
"""

from __future__ import annotations

from torch import nn

from penstock.config import ParallelConfig
from penstock.distributed.mesh import Mesh
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.distributed.sequence.declared import apply_declared, check_declared
from penstock.distributed.sequence.plan import SequenceParallelModelPlan, sequence_plan_of
from penstock.errors import DeclarationError
from penstock.models.rows.table import reason_of, row_of
from penstock.undo import Undo


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


def apply_sequences(denoiser: nn.Module, mesh: Mesh) -> Undo:
    """Split the sequences of a denoiser, which `check_sequences` has passed, over a mesh's ring and Ulysses ranks."""
    if mesh["sequence"].size == 1:
        return Undo()
    plan = _plan_of(denoiser)
    if plan is not None:
        return apply_declared(denoiser, plan, mesh)
    row = row_of(denoiser)
    assert row is not None  # checked, when all blocks were there
    return apply_sequence(denoiser, row, mesh)


def _plan_of(denoiser: nn.Module) -> SequenceParallelModelPlan | None:
    """The plan to carry out; None where a row is better, or nothing is known."""
    if getattr(denoiser, "_sp_plan", None) is not None or _has_only_a_plan(denoiser):
        return sequence_plan_of(denoiser)
    return None


def _has_only_a_plan(denoiser: nn.Module) -> bool:
    return row_of(denoiser) is None and reason_of(denoiser) is None

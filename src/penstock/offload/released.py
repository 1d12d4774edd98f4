"""Weights that only memory had, once ranks have shards of them: the whole ones are let go, and come back in the end.

A weight in a file costs no memory where it is; one that was cast, made or changed does, on every rank. Owns the
originals' memory; does not know which ranks have what.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from penstock.offload.residency import Residency
from penstock.offload.tenants import Tenant
from penstock.offload.units import Unit, Weight
from penstock.undo import Undo
from penstock.weights.maps import give_back
from penstock.weights.proof import Proof
from penstock.weights.ranges import HostRange, Piece, Unread


def is_in_memory(unit: Unit) -> bool:
    """Whether memory alone has some of a unit's weights."""
    return any(isinstance(piece.range, HostRange) for piece in unit.pieces)


def let_go(residency: Residency, undo: Undo, proof: Proof | None = None) -> None:
    """Free the weights that memory alone had; each unit's source must not read them any more.

    A weight stays the object that it was, without elements. Memory that others hold as well stays theirs.

    Args:
        residency: of all units.
        undo: to which is added what brings them back, on all ranks together.
        proof: is told what they were.

    Cost: in the end one fill of each of these units, and the memory of the whole weights.
    """
    gone: list[tuple[Tenant, list[Weight]]] = []
    undo.add(partial(_bring_all_back, residency, gone))
    memories: list[torch.Tensor] = []
    for tenant in residency.tenants:
        weights = [weight for weight in tenant.unit.weights if _is_in_memory(tenant.unit, weight)]
        if not weights:
            continue
        if proof is not None:
            proof.expect(tenant.name, tenant.unit.pieces)
        gone.append((tenant, weights))
        memories += _taken(tenant.unit.pieces)
        for weight in weights:
            with torch.inference_mode(weight.original.is_inference()):
                weight.original.data = torch.empty(0, dtype=weight.original.dtype)
    give_back(memories)


def _taken(pieces: list[Piece]) -> list[torch.Tensor]:
    """The memory of pieces, which they do not have any more."""
    memories = []
    for number, piece in enumerate(pieces):
        if isinstance(piece.range, HostRange):
            memories.append(piece.range.memory)
            pieces[number] = replace(piece, range=Unread(piece.range.num_bytes))
    return memories


def _bring_all_back(residency: Residency, gone: list[tuple[Tenant, list[Weight]]]) -> None:
    while gone:
        _bring_back(residency, *gone[-1])
        gone.pop()


def _is_in_memory(unit: Unit, weight: Weight) -> bool:
    return isinstance(unit.pieces[weight.piece].range, HostRange)


def _bring_back(residency: Residency, tenant: Tenant, weights: list[Weight]) -> None:
    """Give a unit's weights memory of their own again; those that shared some do so again."""
    residency.ready(tenant)
    copies: dict[tuple[int, bool], torch.Tensor] = {}
    lives = dict(zip(map(id, tenant.unit.weights), tenant.live, strict=True))
    for weight in weights:
        piece, position = tenant.unit.pieces[weight.piece], tenant.layout.positions[weight.piece]
        is_inference = weight.original.is_inference()  # torch refuses memory of the other kind
        with torch.inference_mode(is_inference):
            if (weight.piece, is_inference) not in copies:
                begin = tenant.plan.begin + position
                memory = residency.arena.tensor[begin : begin + piece.num_bytes]
                copies[weight.piece, is_inference] = memory.cpu().clone()
            live = lives[id(weight)]
            flat = copies[weight.piece, is_inference].view(live.dtype)
            weight.original.data = flat.as_strided(live.shape, live.stride(), weight.offset // live.itemsize)

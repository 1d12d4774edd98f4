"""Which weights become shards, in which dtype, and which stay whole on every rank.

Owns that choice, and carries it out but for the sharding itself. Does not know how shards are gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from penstock.distributed.hsdp.config import ShardingError
from penstock.distributed.hsdp.units import ignored_parameters, outside_parameters
from penstock.models.dtypes import target_dtypes

IGNORED = "its module is ignored"
INTEGER = "it is not floating"
PACKED = "it is packed"
SCALAR = "it has no dimension"
ONE_ROW = "it has one row"
SCATTERED = "it is not contiguous"
TIED = "units share it"
OUTSIDE = "it is used outside of its unit"


@dataclass(frozen=True)
class Sorting:
    """A model's parameters, each once, under the first of its names.

    Attributes:
        sharded: those of which each rank is to hold a part.
        whole: those that every rank holds, with the reason.
    """

    sharded: Mapping[str, nn.Parameter]
    whole: Mapping[str, tuple[nn.Parameter, str]]

    @property
    def sharded_bytes(self) -> int:
        """Bytes of what is sharded, all ranks together."""
        return sum(parameter.nbytes for parameter in self.sharded.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes of what each rank holds besides its shards."""
        return sum(parameter.nbytes for parameter, _ in self.whole.values())


def sort_weights(model: nn.Module, units: Iterable[nn.Module]) -> Sorting:
    """Tell the parameters that FSDP2 can shard from those that it cannot, or should not.

    Args:
        model: not yet sharded.
        units: its units besides the root.

    Raises:
        ShardingError: for a model that is sharded already, and for one whose units hold nothing to shard.
    """
    units = list(units)
    ignored = ignored_parameters(model)
    owners = Counter(id(parameter) for unit in units for parameter in {*unit.parameters()})
    outside = {id(parameter) for parameter in _outside(model, units)}
    used = outside_parameters(model)
    sharded: dict[str, nn.Parameter] = {}
    whole: dict[str, tuple[nn.Parameter, str]] = {}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        reason = _obstacle(name, parameter)
        if key in ignored:
            reason = IGNORED
        elif not reason and (key in used or owners[key] + (key in outside) > 1):
            reason = OUTSIDE if key in used else TIED
        if reason:
            whole[name] = (parameter, reason)
        else:
            sharded[name] = parameter
    if not any(owners[id(parameter)] for parameter in sharded.values()):
        reasons = Counter(reason for parameter, reason in whole.values() if owners[id(parameter)])
        told = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common()) or "they have none"
        raise ShardingError(
            f"0 of the parameters in the {len(units)} units of {type(model).__name__} can be sharded ({told}). Load "
            "the model without quantisation, or leave it whole."
        )
    return Sorting(sharded, whole)


def _outside(model: nn.Module, units: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    inside = {id(inner) for unit in units for inner in unit.modules()}
    for module in model.modules():
        if id(module) not in inside:
            yield from module.parameters(recurse=False)


def _obstacle(name: str, parameter: nn.Parameter) -> str:
    """Why a parameter cannot be a shard; empty where it can."""
    if isinstance(parameter, DTensor):
        raise ShardingError(
            f"{name} is sharded already, over {parameter.device_mesh.size()} ranks. Load the model again."
        )
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        return PACKED  # the library's own classes
    if not parameter.is_floating_point():
        return INTEGER
    if parameter.itemsize < 2:
        return PACKED
    if parameter.ndim == 0:
        return SCALAR
    if parameter.shape[0] <= 1:
        return ONE_ROW  # each rank would hold it, padded
    return "" if parameter.is_contiguous() else SCATTERED


def cast_weights(model: nn.Module, sorting: Sorting, dtype: torch.dtype | None) -> int:
    """Cast the parameters that have the dtype of most of the model, in place.

    Left as they are: ignored and packed parameters, those of other dtypes, and those that the class keeps in float32.

    Args:
        model: not yet sharded.
        sorting: of its parameters.
        dtype: None casts nothing.

    Returns:
        How many were cast.
    """
    found: Counter[torch.dtype] = Counter()
    for parameter in sorting.sharded.values():
        found[parameter.dtype] += parameter.nbytes
    usual = found.most_common(1)[0][0]
    if dtype is None or usual == dtype:
        return 0
    may_cast = {name for name, (_, reason) in sorting.whole.items() if reason not in (IGNORED, PACKED)}
    may_cast.update(sorting.sharded)
    islands = _islands(model, dtype)
    chosen = [
        parameter
        for name, parameter in model.named_parameters()
        if name in may_cast and name not in islands and parameter.dtype == usual
    ]
    for parameter in chosen:
        parameter.data = parameter.data.to(dtype)
    return len(chosen)


def _islands(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the parameters that stay in float32 where the model is asked for in another dtype."""
    if isinstance(model, (ModelMixin, PreTrainedModel)):
        return {name for name, target in target_dtypes(model, dtype).items() if target != dtype}
    kept = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    words = {kept} if isinstance(kept, str) else set(kept)
    return {
        name
        for name, parameter in model.named_parameters()
        if words.intersection(name.split(".")) and parameter.dtype == torch.float32
    }


def move_whole(sorting: Sorting, device: torch.device) -> None:
    """Move what stays whole to a device; sharding moves the rest.

    Raises:
        ShardingError: for packed weights of a library's own class that are elsewhere: only the library can move them.
    """
    strangers = {name: parameter for name, (parameter, _) in sorting.whole.items() if parameter.device != device}
    for name, parameter in strangers.items():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            raise ShardingError(
                f"{name} is a {type(parameter.data).__name__} on {parameter.device}, and shards go to {device}. Packed "
                f"weights are moved by the library that packed them: load the model on {device}."
            )
    for parameter in strangers.values():
        parameter.data = parameter.data.to(device)

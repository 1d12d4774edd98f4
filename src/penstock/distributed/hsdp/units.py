"""Which modules of a model are gathered as one: its units.

A unit is a repeated block, or a module that a class names; what no unit holds belongs to the model itself, the root.
Owns that choice. Does not know ranks, or which of a unit's weights can be sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from penstock.distributed.hsdp.config import ShardingError
from penstock.errors import DeclarationError
from penstock.models.components import declared_paths, resolve_path
from penstock.models.stacks import find_stacks

Condition = Callable[[str, nn.Module], bool]

_READ_OUTSIDE = {
    "DiTTransformer2DModel": "transformer_blocks.0.norm1.emb",
    "Transformer2DModel": "transformer_blocks.0.norm1.emb",  # of its adaptive norms; others have none
}
"""By the name of the class: a module of a unit that the model's own forward calls, when the unit is not gathered."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # have no forward before which they could be gathered


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The units of a model besides the root, by path, in order of definition; none lies in another.

    Where the class declares `_hsdp_shard_conditions`, a unit is what satisfies any of them, lies in no other unit, and
    is a repeated block (an element of a list) or has a name that is no number. An element of a list within a block,
    as `blocks.3.to_out.0`, is none. Otherwise the blocks of the model's stacks are the units.

    Args:
        model: not yet sharded.

    Raises:
        DeclarationError: for a declaration that is not true of the class.
        ShardingError: where there is no unit.
    """
    conditions = getattr(model, "_hsdp_shard_conditions", None)
    blocks = {id(block): block for stack in find_stacks(model) for block in stack.blocks}
    ignored = {id(inner) for module in _ignored_modules(model) for inner in module.modules()}
    if conditions:
        units = _declared(model, _checked(model, conditions), blocks, ignored)
    else:
        units = {name: module for name, module in model.named_modules() if id(module) in blocks}
        units = {name: module for name, module in units.items() if id(module) not in ignored}
    for name, module in units.items():
        if isinstance(module, _CONTAINERS):
            raise DeclarationError(
                f"{type(model).__name__}.{name} is a unit and a {type(module).__name__}, which has no forward before "
                "which it could be gathered. Name its elements."
            )
    if not units:
        raise ShardingError(_nothing_found(model, conditions))
    return units


def ignored_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that a class leaves whole: those under the paths of `_hsdp_ignored_modules`.

    Raises:
        DeclarationError: for a path that the class does not have, or that leads to something else.
    """
    modules = _ignored_modules(model)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def outside_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of a unit that the model's own forward uses besides."""
    paths = (path for owner in type(model).__mro__ if (path := _READ_OUTSIDE.get(owner.__name__)))
    modules = dict(model.named_modules())
    return {id(parameter) for path in paths if path in modules for parameter in modules[path].parameters()}


def _ignored_modules(model: nn.Module) -> list[nn.Module]:
    modules = []
    for path in declared_paths(type(model), "_hsdp_ignored_modules"):
        module = resolve_path(model, path)
        if not isinstance(module, nn.Module):
            raise DeclarationError(
                f"{type(model).__name__}._hsdp_ignored_modules names {path!r}, a {type(module).__name__} and no "
                "module. Correct it on the class."
            )
        modules.append(module)
    return modules


def _checked(model: nn.Module, conditions: Iterable[Condition]) -> list[Condition]:
    conditions = list(conditions) if isinstance(conditions, (list, tuple)) else [conditions]  # type: ignore[list-item]
    for condition in conditions:
        if not callable(condition):
            raise DeclarationError(
                f"{type(model).__name__}._hsdp_shard_conditions holds {condition!r}, not a function of a name and a "
                "module. Correct it on the class."
            )
    return conditions


def _declared(
    model: nn.Module, conditions: list[Condition], blocks: dict[int, nn.Module], ignored: set[int]
) -> dict[str, nn.Module]:
    within = {id(inner) for block in blocks.values() for inner in block.modules() if inner is not block}
    lists = {id(element) for module in model.modules() if isinstance(module, nn.ModuleList) for element in module}
    units: dict[str, nn.Module] = {}
    taken = set(ignored)
    for name, module in _matching(model, conditions):
        is_numbered = name.rpartition(".")[2].isdigit()
        is_repeated = id(module) in blocks or (id(module) in lists and id(module) not in within)
        if id(module) not in taken and (is_repeated or not is_numbered):
            units[name] = module
            taken.update(map(id, module.modules()))
    return units


def _matching(model: nn.Module, conditions: list[Condition]) -> Iterator[tuple[str, nn.Module]]:
    """What satisfies a condition; outer modules come before what they hold."""
    for name, module in model.named_modules():
        if name and not isinstance(module, _CONTAINERS) and any(condition(name, module) for condition in conditions):
            yield name, module


def _nothing_found(model: nn.Module, conditions: object) -> str:
    owner = type(model).__name__
    if not conditions:
        return (
            f"{owner} has 0 units: no list of blocks was found in it. Declare `_hsdp_shard_conditions` on the class, "
            "a list of functions of a name and a module that say which modules are gathered as one."
        )
    checked = _checked(model, conditions)  # type: ignore[arg-type]
    found = [name for name, _ in _matching(model, checked)]
    shown = f", such as {found[0]!r}, which lie within blocks or are ignored" if found else ""
    return (
        f"{owner} has 0 units: its {len(checked)} _hsdp_shard_conditions match {len(found)} modules{shown}. A unit is "
        "a repeated block, or a module with a name that is no number. Correct the conditions."
    )

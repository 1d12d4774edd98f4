"""To whom the modules of placed pipelines belong: found from any pipeline that shares one of them.

An owner lives as long as a component that it owns, whoever holds that: what it has put on can always be taken back.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from penstock.errors import DeclarationError
from penstock.models.components import Component, discover

_KEEPER = "_penstock_keeper"
_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType[Any]] = WeakKeyDictionary()  # by module


class _Keeper:
    """Keeps an owner alive from within a component; copies and pickles of the component have none."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: Any) -> _Keeper:
        return _Keeper(None)

    def __reduce__(self) -> Any:
        return type(None), ()


def own(pipeline: Any, owner: Any) -> None:
    """Have all modules of a pipeline belong to an owner."""
    for component in discover(pipeline).components:
        vars(component.module)[_KEEPER] = _Keeper(owner)
        _OWNERS.update((module, ref(owner)) for module in component.module.modules())


def disown(owner: Any) -> None:
    """Have nothing belong to an owner any more."""
    for module in [module for module, found in _OWNERS.items() if found() is owner]:
        del _OWNERS[module]
        vars(module).pop(_KEEPER, None)


def owner_of(pipeline: Any) -> tuple[Component, Any] | None:
    """The first component of a pipeline that belongs to somebody, and to whom; None where all are free.

    Cost: a look at each module.
    """
    try:
        components = discover(pipeline).components
    except DeclarationError:  # nothing of it could be placed
        return None
    for component in components:
        for module in component.module.modules():
            found = _OWNERS.get(module)
            owner = found() if found is not None else None
            if owner is not None:
                return component, owner
    return None

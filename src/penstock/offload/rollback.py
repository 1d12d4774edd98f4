"""Loading an adapter succeeds, or leaves the pipeline as it was.

diffusers and peft change layer by layer: a file that does not fit leaves some layers with an adapter. Here what modules
consist of is noted before and put back after a failure, whatever it was.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from penstock.errors import ConfigError
from penstock.undo import Undo

Settle = Callable[[], bool]
"""Gives every streamed weight its place again; whether one was written to since."""

_LOADS = ("load_lora_weights", "load_lora_adapter")
_CONTAINERS = (dict, OrderedDict, list, set)
_NORMS = "_transformer_norm_layers"  # by which diffusers brings back what a file's norm layers have overwritten
_WRITES = (
    "the adapter would change weights that penstock streams: beside its low-rank layers it holds whole ones, such as "
    "norm layers. Nothing was loaded. Call remove() on what penstock.apply returned, load the adapter, and apply "
    "again; or use offload='none'."
)


class Snapshot:
    """What modules consist of now, their weights' values excepted.

    Args:
        modules: with all modules inside them.
        owners: other objects whose attributes are noted, such as the pipeline.

    Cost: a few dictionaries per module.
    """

    def __init__(self, modules: Sequence[nn.Module], owners: Sequence[Any] = ()) -> None:
        inner = {id(found): found for module in modules for found in module.modules()}
        self._attributes = [
            (owner, {name: (value, _contents(value)) for name, value in vars(owner).items()})
            for owner in (*owners, *inner.values())
        ]
        self._flags = [
            (found._parameters, name, parameter.requires_grad)
            for found in inner.values()
            for name, parameter in found._parameters.items()
            if parameter is not None
        ]

    def restore(self) -> None:
        """Put all of it back."""
        for owner, attributes in self._attributes:
            state = vars(owner)
            norms = state.get(_NORMS)
            if norms and _NORMS not in attributes:
                owner.load_state_dict(norms, strict=False)
            for name in [name for name in state if name not in attributes]:
                del state[name]
            for name, (value, contents) in attributes.items():
                state[name] = value
                if contents is not None:
                    value.clear()
                    getattr(value, "extend" if isinstance(value, list) else "update")(contents)

    def restore_flags(self) -> None:
        """Let weights record gradients, or not, as they did."""
        for table, name, flag in self._flags:
            parameter = table[name]
            if parameter is not None and parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def whole_loads(pipeline: Any, modules: Sequence[nn.Module], settle: Settle = lambda: False) -> Undo:
    """Have a pipeline and its components load adapters as a whole or not at all.

    Args:
        pipeline: whose methods are wrapped.
        modules: its components.
        settle: called after each load; where it says that weights were written to, the load is refused.

    Returns:
        What takes the wrappers away.
    """
    undo = Undo()
    for owner in (pipeline, *modules):
        for name in _LOADS:
            if callable(getattr(owner, name, None)):
                undo.add(_wrap(owner, name, pipeline, modules, settle))
    return undo


def _wrap(owner: Any, name: str, pipeline: Any, modules: Sequence[nn.Module], settle: Settle) -> Callable[[], None]:
    own, before = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(own)
    def load(*args: Any, **kwargs: Any) -> Any:
        snapshot = Snapshot(modules, [pipeline])
        is_whole = False
        try:
            result = own(*args, **kwargs)
            is_whole = not settle()
        except RuntimeError as error:  # torch's load_state_dict makes one of whatever a weight has raised
            if "penstock streams" in str(error):
                raise ConfigError(_WRITES) from error
            raise
        finally:
            if not is_whole:
                snapshot.restore()
                settle()
                snapshot.restore_flags()
        if not is_whole:
            raise ConfigError(_WRITES)
        return result

    def undo() -> None:
        vars(owner).pop(name, None)
        if before is not None:
            object.__setattr__(owner, name, before)

    object.__setattr__(owner, name, load)
    return undo


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None

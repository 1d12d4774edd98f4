"""The forward of one module runs inside of something of ours.

Owns what is put on the module, and takes it back. Does not know what it is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penstock.undo import Undo

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Given the forward, and its arguments: runs it, and returns what is to be returned."""


def wrap_forward(module: nn.Module, around: Around) -> Undo:
    """Have something run in the place of a module's forward, its hooks outside of it as before.

    Args:
        module: of which this one object changes.
        around: runs the forward that was there. It is not compiled; the forward that was there is.

    Returns:
        What takes it back, unless somebody has put another forward in its place since.
    """
    compute = module.forward
    own = vars(module).get("forward")

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(compute, args, kwargs)

    wrapped = torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]

    def restore() -> None:
        if vars(module).get("forward") is not wrapped:
            return
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own

    undo = Undo()
    undo.add(restore)
    vars(module)["forward"] = wrapped
    return undo

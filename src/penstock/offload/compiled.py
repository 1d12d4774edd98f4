"""`torch.compile` of a hooked block: the hooks stay outside of the compiled region.

`nn.Module.compile` compiles the call with its hooks, which would break the graph at each; while a block is placed, its
`compile` compiles `forward` alone. Addresses of weights never change, so that nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from penstock.errors import ConfigError


def compile_inside(block: nn.Module) -> Callable[[], None]:
    """Let `block.compile()` (and diffusers' `compile_repeated_blocks`) compile the block's forward inside its hooks.

    Returns:
        A function that puts the block's own `compile` and `forward` back.

    Raises:
        ConfigError: for a block that is compiled already.
    """
    if block._compiled_call_impl is not None:
        raise ConfigError(
            f"a {type(block).__name__} is compiled already, and hooks would not be seen by it. "
            "Place the pipeline first, then compile its blocks."
        )
    compiled: list[tuple[Any, Any]] = []  # the compiled forward, and the one of the block's own before it

    def compile_forward(*args: Any, **kwargs: Any) -> None:
        compiled.append((torch.compile(block.forward, *args, **kwargs), vars(block).get("forward")))
        vars(block)["forward"] = compiled[-1][0]

    def undo() -> None:
        if vars(block).get("compile") is compile_forward:
            del vars(block)["compile"]
        while compiled:
            made, own = compiled[-1]
            if vars(block).get("forward") is made:  # else it is somebody else's by now
                if own is None:
                    del vars(block)["forward"]
                else:
                    vars(block)["forward"] = own
            compiled.pop()

    vars(block)["compile"] = compile_forward
    return undo

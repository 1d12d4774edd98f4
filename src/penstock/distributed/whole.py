"""What needs a denoiser whole says so while it is split.

An adapter that is loaded by then would be cut by nobody, and what is saved would be a part of the denoiser. Knows the
methods of diffusers that do such things. Does not know how a denoiser is split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from penstock.errors import ConfigError
from penstock.undo import Undo

METHODS = (
    "add_adapter",
    "load_attn_procs",
    "load_ip_adapter",
    "load_lora_adapter",
    "load_lora_weights",
    "fuse_qkv_projections",
    "save_pretrained",
)


def refuse_while_split(owner: Any, how: str, undo: Undo, mend: Callable[[], None] = lambda: None) -> None:
    """Make those methods raise a ConfigError, until the undo.

    Args:
        owner: a denoiser or its pipeline; those of the methods that it has are hidden.
        how: it is split, such as "in 2 stages".
        undo: to which the way back is added.
        mend: takes back what a caller of such a method has changed before, as diffusers widens layers for an adapter.
    """
    own = vars(owner)
    hidden = {name: own[name] for name in METHODS if name in own}

    def show() -> None:
        for name in METHODS:
            own.pop(name, None)
        own.update(hidden)

    undo.add(show)
    kind = type(owner).__name__
    own.update({name: partial(_refuse, f"{kind}.{name}", how, mend) for name in METHODS if hasattr(owner, name)})


def _refuse(method: str, how: str, mend: Callable[[], None], *_: Any, **__: Any) -> NoReturn:
    mend()
    raise ConfigError(
        f"{method}: the denoiser is split {how}, and this needs its layers whole. Load or fuse adapters before it is "
        "split: take penstock off the pipeline first (`remove()`), or load the pipeline again."
    )

"""What a placed pipeline refuses: everything that would move or change weights behind the streamer's back.

The methods are replaced on the very objects, and put back by `remove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from penstock.errors import ConfigError

_PIPELINE_METHODS = (
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
    "reset_device_map",
    "fuse_lora",
    "unfuse_lora",
    "fuse_qkv_projections",
)
_MODULE_METHODS = (
    "half",
    "float",
    "double",
    "bfloat16",
    "fuse_lora",
    "enable_group_offload",
    "enable_layerwise_casting",
    "fuse_qkv_projections",
    "requires_grad_",
    "train",
)
_MOVES = ("to", "cuda", "cpu", "xpu")


def guard(pipeline: Any, modules: Iterable[nn.Module], device: torch.device) -> Callable[[], None]:
    """Refuse on a pipeline and its modules what would change or move weights; moving to where they are is allowed.

    Returns:
        A function that takes the guards away again.
    """
    undo = [_replace(pipeline, name, _refusal) for name in _PIPELINE_METHODS if hasattr(pipeline, name)]
    owners: list[Any] = [pipeline, *modules]
    for owner in owners:
        undo.extend(
            _replace(owner, name, lambda *a: _move(*a, device=device)) for name in _MOVES if hasattr(owner, name)
        )
    for module in owners[1:]:
        undo.extend(_replace(module, name, _refusal) for name in _MODULE_METHODS if hasattr(module, name))

    def take_away() -> None:
        while undo:
            undo.pop()()

    return take_away


def _replace(owner: Any, name: str, make: Callable[[Any, str], Callable[..., Any]]) -> Callable[[], None]:
    own = vars(owner).get(name)
    object.__setattr__(owner, name, make(owner, name))

    def undo() -> None:
        if own is None:
            vars(owner).pop(name, None)
        else:
            object.__setattr__(owner, name, own)

    return undo


def _refusal(owner: Any, name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if name == "train" and (args == (False,) or kwargs == {"mode": False}):
            return owner  # what `eval` calls
        if name == "requires_grad_" and (args == (False,) or kwargs == {"requires_grad": False}):
            return owner
        raise ConfigError(
            f"{type(owner).__name__}.{name} would change or move weights that penstock has placed. Call remove() on "
            "what penstock.apply returned (or load with offload='none'), then do this, then apply again."
        )

    return refuse


def _move(owner: Any, name: str, *, device: torch.device) -> Callable[..., Any]:
    def move(*args: Any, **kwargs: Any) -> Any:
        wanted = {"cuda": torch.device("cuda", *(args or (0,))), "cpu": torch.device("cpu")}.get(name)
        if name == "to" and not _changes_dtype(owner, args, kwargs):
            wanted = next((d for d in (_device(value) for value in (*args, *kwargs.values())) if d), device)
        if wanted is not None and _is_same(wanted, device):
            return owner
        raise ConfigError(
            f"{type(owner).__name__}.{name}: penstock has placed this pipeline on {device} and streams its weights in "
            "the dtypes they have. Call remove() first, or choose device and dtype when you load or apply."
        )

    return move


def _changes_dtype(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    return any(dtype != getattr(owner, "dtype", dtype) for dtype in dtypes)


def _device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    return torch.device(value) if isinstance(value, str) else None


def _is_same(wanted: torch.device, device: torch.device) -> bool:
    return wanted.type == device.type and (wanted.index or 0) == (device.index or 0)

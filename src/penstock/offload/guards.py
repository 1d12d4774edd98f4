"""What a placed pipeline refuses: everything that would move or change weights behind the streamer's back.

The methods are replaced on the very objects, and put back by `remove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    "load_textual_inversion",  # these exchange the embeddings
    "unload_textual_inversion",
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
    "resize_token_embeddings",
    "train",
)
_COPIES = ("__deepcopy__", "__reduce_ex__")  # found on the object itself by copy.deepcopy and pickle
_MOVES = ("to", "cuda", "cpu", "xpu")


def guard(pipeline: Any, modules: Iterable[nn.Module], device: torch.device) -> Callable[[], None]:
    """Refuse on a pipeline and its modules what would change or move weights; moving to where they are is allowed.

    Returns:
        A function that takes the guards away again.
    """
    undo = [_replace(pipeline, name, _refusal) for name in _PIPELINE_METHODS if hasattr(pipeline, name)]
    owners: list[Any] = [pipeline, *modules]
    for owner in owners:
        undo.extend(_replace(owner, name, _refusal) for name in _COPIES)
        undo.extend(
            _replace(owner, name, lambda *a: _move(*a, device=device)) for name in _MOVES if hasattr(owner, name)
        )
    for module in owners[1:]:
        undo.extend(_replace(module, name, _refusal) for name in _MODULE_METHODS if hasattr(module, name))

    def take_away() -> None:
        for step in reversed(undo):
            step()

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
    own = getattr(owner, name, None)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if (
            own is not None
            and name in ("train", "requires_grad_")
            and (args == (False,) or [*kwargs.values()] == [False])
        ):
            return own(*args, **kwargs)  # what `eval` calls, and what changes nothing
        if name in _COPIES:
            raise ConfigError(
                f"a copy of this {type(owner).__name__} would need weights of its own, and penstock streams or splits "
                "them. For another pipeline with the same modules call from_pipe(); for a copy call remove() on what "
                "penstock.placed_on(pipeline) returns, then copy, then apply again."
            )
        raise ConfigError(
            f"{type(owner).__name__}.{name} would change, move or copy weights that penstock has placed. Call remove() "
            "on what penstock.apply returned (or load with offload='none'), then do this, then apply again."
        )

    return refuse


def _move(owner: Any, name: str, *, device: torch.device) -> Callable[..., Any]:
    def move(*args: Any, **kwargs: Any) -> Any:
        formats = [given for given in (*args, *kwargs.values()) if isinstance(given, torch.memory_format)]
        if any(given is not torch.preserve_format for given in formats):
            raise ConfigError(
                f"{type(owner).__name__}.{name}: penstock streams weights in the memory format they have, and would "
                f"ignore {formats[0]}. Call remove() first, convert the module, then apply again: it is kept."
            )
        named = {"to": device, "cuda": torch.device("cuda"), "cpu": torch.device("cpu")}.get(name)
        wanted = next((given for given in map(_device, (*args, *kwargs.values())) if given), named)
        if _changes_dtype(owner, args, kwargs):
            wanted = None
        if wanted is not None and _is_same(wanted, device):
            return owner
        raise ConfigError(
            f"{type(owner).__name__}.{name}: penstock has placed this pipeline on {device} and streams its weights in "
            "the dtypes they have. Call remove() first, or choose device and dtype when you load or apply."
        )

    return move


def _changes_dtype(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = [value.dtype if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
    return any(dtype not in _dtypes(owner, dtype) for dtype in given if isinstance(dtype, torch.dtype))


def _dtypes(owner: Any, default: torch.dtype) -> set[torch.dtype]:
    """The dtype an owner says it has; for a module that says nothing the one of its floating weights, if it is one."""
    if hasattr(owner, "dtype"):
        return {owner.dtype}
    parameters = owner.parameters() if isinstance(owner, nn.Module) else ()
    found = {parameter.dtype for parameter in parameters if parameter.is_floating_point()} or {default}
    return found if len(found) == 1 else set()


def _device(value: Any) -> torch.device | None:
    if isinstance(value, torch.Tensor):
        return value.device
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    return torch.device(value) if isinstance(value, (str, torch.device)) else None


def _is_same(wanted: torch.device, device: torch.device) -> bool:
    return wanted.type == device.type and (wanted.index or 0) == (device.index or 0)


def let_copy(pipeline: Any, before: Mapping[str, Any]) -> Callable[[], None]:
    """Let `copy.copy` make another pipeline of the same modules: without what placing has put on this one.

    Its modules stay placed, and refuse to be pickled or copied as before.

    Args:
        pipeline: that is placed.
        before: its attributes before that.

    Returns:
        A function that takes this away again.
    """
    ours = {name for name, value in vars(pipeline).items() if before.get(name, vars) is not value} | {"__reduce_ex__"}

    def make(owner: Any, _: str) -> Callable[..., Any]:
        def shallow(protocol: Any) -> Any:
            kind: Any = type(owner)
            reduced = list(kind.__reduce_ex__(owner, protocol))
            if len(reduced) > 2 and isinstance(reduced[2], dict):
                own = {name: value for name, value in before.items() if name in ours}
                reduced[2] = {name: value for name, value in reduced[2].items() if name not in ours} | own
            return tuple(reduced)

        return shallow

    return _replace(pipeline, "__reduce_ex__", make)

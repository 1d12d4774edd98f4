"""A VAE's encode and decode over ranks: what comes in is cut into strips, what comes out is put together.

Owns where strips begin and end. What happens to them in between is `strip`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from penstock.distributed.group import Group
from penstock.distributed.guidance.futures import wait
from penstock.distributed.patch import sums, views, windows
from penstock.distributed.patch.layout import best_layout
from penstock.distributed.patch.strip import Exchange, Strip
from penstock.errors import ConfigError
from penstock.undo import Undo

VAE_CALLS = ("encode", "decode")
HANDLERS = (sums, views, windows)  # whose import tells strips of their operations
_COARSEST = 64
"""Most that a VAE reduces height and width by; borders at multiples stay whole numbers at every level."""
_FEW_ROWS_BYTES = 1 << 20
"""Operations that run whole on less than this are not worth a note."""


def apply_patches(vae: nn.Module, group: Group, tell: Callable[[str], None] = print) -> Undo:
    """Spread each encode and decode of a VAE over ranks by rows or columns, in place; the picture is the plain one.

    No module is changed: the VAE runs as ever, on tensors of which each rank has a strip (`Strip`). Convolutions get
    the rows around it from the neighbours, group norms are summed over all ranks, attention gathers keys and values.
    All ranks must call the VAE with the same values, and all of them get the whole result.

    A picture with fewer rows than ranks, and a call that gradients pass through, run whole on every rank.

    Args:
        vae: its weights may be streamed.
        group: with one rank, nothing is changed.
        tell: takes a note for the user of what ran whole on every rank.

    Returns:
        What restores the VAE.

    Cost: activations and compute of a rank are about 1 / n; see docs/concepts/vae.md for the bytes.
    """
    with Undo() as undo:
        if group.size > 1:
            patches = _Patches(vae, group, tell)
            for name in VAE_CALLS:
                if hasattr(vae, name):
                    undo.wrap(vae, name, partial(patches.run, name))
    return undo


def check_patches(vae: nn.Module) -> None:
    """Refuse what cannot be spread over ranks by rows.

    Args:
        vae: its weights may be on the meta device.

    Raises:
        ConfigError: for a model without `encode` and `decode`.
    """
    name = type(vae).__name__
    if not any(callable(getattr(vae, method, None)) for method in VAE_CALLS):
        raise ConfigError(
            f"the VAE is a {name}, which has neither encode nor decode: where a picture goes in and comes out is "
            "unknown. Leave vae_patch_parallel_size at 1: the denoiser may be split nevertheless."
        )


def put_together(value: Any) -> Any:
    """A value with whole tensors in place of strips; outputs and distributions are changed in place.

    Cost: the bytes of the other ranks' rows.
    """
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__"):  # a distribution
            for name, item in list(vars(leaf).items()):
                if isinstance(item, Strip):
                    setattr(leaf, name, item.whole())
    return tree_map_only(Strip, Strip.whole, value)


class _Patches:
    """The calls of one VAE."""

    def __init__(self, vae: nn.Module, group: Group, tell: Callable[[str], None]) -> None:
        self._vae = vae
        self._group = group
        self._tell = tell
        self._told: set[str] = set()
        self._is_running = False
        self._has_met = False

    def run(self, name: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call on strips; one that it makes in turn is part of it."""
        args, kwargs = wait(args), wait(kwargs)
        samples = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        if self._is_running or not samples:
            return stock(*args, **kwargs)
        sample = samples[0]
        layout = best_layout(sample.shape, self._group.size, _COARSEST)
        reason = self._reason_against(stock, samples)
        if layout is None or reason is not None:
            reason = reason or f"a tensor of shape {tuple(sample.shape)} has fewer rows and columns than ranks"
            self._note(
                reason, f"{type(self._vae).__name__}.{name} ran whole on each of {self._group.size} ranks: {reason}."
            )
            return stock(*args, **kwargs)
        self._meet(sample.device)
        exchange = Exchange(self._group)
        strip = exchange.strip(sample, layout)
        args = tuple(strip if item is sample else item for item in args)
        kwargs = {key: strip if item is sample else item for key, item in kwargs.items()}
        self._is_running = True
        try:
            result = put_together(stock(*args, **kwargs))
        finally:
            self._is_running = False
        where = f"{type(self._vae).__name__}.{name}"
        for operation in sorted(exchange.whole):
            self._note(operation, f"{where}: {operation} ran whole on each of {self._group.size} ranks, not by rows.")
        return result

    def _reason_against(self, stock: Callable[..., Any], samples: Sequence[Tensor]) -> str | None:
        """Why a call must run whole, if it must."""
        weights = self._vae.parameters()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*samples, *weights)):
            return "gradients pass through it (torch.no_grad() avoids that)"
        if hasattr(stock, "_torchdynamo_orig_callable") or any(map(_is_compiled, self._vae.modules())):
            return "the VAE is compiled"
        return None

    def _meet(self, device: torch.device) -> None:
        """Have all ranks take part in a first exchange, which NCCL wants before messages between two of them."""
        if not self._has_met and device.type == "cuda":
            self._group.all_reduce(torch.zeros(1, device=device))
        self._has_met = True

    def _note(self, key: str, note: str) -> None:
        """Tell the user something once."""
        if key not in self._told:
            self._told.add(key)
            self._tell(note)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_torchdynamo_orig_callable")

"""How attention that runs anywhere in a denoiser comes to us: through diffusers' backends, and torch's own function.

While a module that a row names runs, what it sees is known (`attending`); every attention call within it is then
carried out over all ranks, with the kernel that the user chose. All other attention runs as ever.

Owns what is put in the way, and takes it out after the last user. Does not know rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from penstock.distributed.sequence.attention import Call, Sight, attend
from penstock.errors import GenerationError

Seen = Sight | Callable[[Call], Sight | None]
"""What attention sees; or what tells so from a call, None for one that runs as ever."""


@dataclass
class Look:
    """One look of attention at what is cut: from `attending` to `done_attending`.

    Attributes:
        seen: what it sees.
        was_attended: whether any call of attention came to us meanwhile.
    """

    seen: Seen
    was_attended: bool = False
    _token: Token[Look | None] = field(init=False, repr=False)


_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)
_FUNCTION = "scaled_dot_product_attention"
_SKIPPING_HOOKS = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache", "layer_skip_hook")
_users: set[object] = set()
_replaced: dict[Any, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {}
"""By backend, or name of torch's function: ours, and what was there before."""


def attending(seen: Seen) -> Look:
    """Say what attention sees from now on."""
    look = Look(seen)
    look._token = _LOOK.set(look)
    return look


def done_attending(look: Look) -> None:
    """What it saw before."""
    _LOOK.reset(look._token)


def install(user: object) -> None:
    """Get in the way of all attention of this process, as it is now: also of what was put in its place by others.

    Args:
        user: who needs that, until its `uninstall`.
    """
    _users.add(user)
    registry = attention_dispatch._AttentionBackendRegistry._backends
    for name, backend in list(registry.items()):
        if not _is_ours(name, backend):
            ours = _seeing_backend(backend)
            _replaced[name] = ours, backend
            registry[name] = ours
    function = F.scaled_dot_product_attention
    if not _is_ours(_FUNCTION, function):
        ours = _seeing_function(function)
        _replaced[_FUNCTION] = ours, function
        F.scaled_dot_product_attention = ours


def uninstall(user: object) -> None:
    """Get out of the way once nobody needs it; what others have put in our place since then stays."""
    _users.discard(user)
    if _users:
        return
    registry = attention_dispatch._AttentionBackendRegistry._backends
    for name, backend in list(registry.items()):
        if _is_ours(name, backend):
            registry[name] = _replaced[name][1]
    if _is_ours(_FUNCTION, F.scaled_dot_product_attention):
        F.scaled_dot_product_attention = _replaced[_FUNCTION][1]
    _replaced.clear()


def may_skip(module: nn.Module) -> bool:
    """Whether diffusers may keep a module from attending, as caches do: it then gives what it kept of its tokens."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(name in registry.hooks for name in _SKIPPING_HOOKS)


def _is_ours(name: Any, found: Callable[..., Tensor]) -> bool:
    return name in _replaced and _replaced[name][0] is found


def _seeing_backend(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend of diffusers, which takes (batch, tokens, heads, head_dim), over all ranks where a sight is set."""

    @functools.wraps(backend)
    def seeing(*args: Any, **options: Any) -> Tensor:
        if _LOOK.get() is None:
            return backend(*args, **options)
        output: Tensor = _over_ranks(backend, *args, **options)
        return output

    return seeing


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _over_ranks(backend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    masked = "attn_mask" in options
    mask = options.pop("attn_mask", None)

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        given = {"attn_mask": mask} if masked else {}
        return backend(query=query, key=key, value=value, **given, **options)

    if mask is not None and mask.ndim == 2 and mask.shape[0] not in (1, query.shape[0]):
        mask = _in_four_dims(mask)  # a backend reads (batch, keys), and hands others on to torch's function
    call = Call(query, key, value, mask, options.get("scale"), options.get("is_causal", False))
    return _attend(call, kernel, options)


def _seeing_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's function, which takes (batch, heads, tokens, head_dim), over all ranks where a sight is set."""

    def seeing(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        }
        if _LOOK.get() is None:
            return function(query, key, value, attn_mask, **options)
        output: Tensor = _function_over_ranks(function, query, key, value, attn_mask, options)
        return output

    return seeing


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _function_over_ranks(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, **options)
        return output.transpose(1, 2)

    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call = Call(query, key, value, _in_four_dims(mask), options["scale"], options["is_causal"])
    return _attend(call, kernel, options).transpose(1, 2)


def _in_four_dims(mask: Tensor | None) -> Tensor | None:
    """As torch reads it: the last dims are heads, queries and keys."""
    return None if mask is None else mask[(None,) * (4 - mask.ndim)]


def _attend(call: Call, kernel: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
    look = _LOOK.get()
    assert look is not None  # found by the caller
    look.was_attended = True
    token = _LOOK.set(None)  # the kernel's own attention is local
    try:
        sight = look.seen(call) if callable(look.seen) else look.seen
        if sight is None:
            return kernel(call.query, call.key, call.value, call.mask)
        _check(sight, options)
        return attend(sight, call, kernel)
    finally:
        _LOOK.reset(token)


def _check(sight: Sight, options: dict[str, Any]) -> None:
    if options.get("dropout_p"):
        raise GenerationError(
            f"attention with dropout_p={options['dropout_p']} differs from rank to rank. Set the denoiser to eval(), "
            "as pipelines do, or use ulysses_degree=1 and ring_degree=1."
        )
    if options.get("attention_kwargs") and sight.streams.ring.size > 1:
        raise GenerationError(
            f"attention with {options['attention_kwargs']} cannot go around a ring of {sight.streams.ring.size}: its "
            "parts are computed by another kernel. Use ulysses_degree in place of ring_degree."
        )

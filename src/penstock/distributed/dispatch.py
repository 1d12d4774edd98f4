"""How attention that runs anywhere in a denoiser comes to us: through diffusers' backends, and torch's own function.

While a module that a row names runs, what it sees is known (`attending`); every attention call within it is then
carried out over all ranks, with the kernel that the user chose. All other attention runs as ever.

Owns what is put in the way, and takes it out after the last user. Does not know rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor

from penstock.distributed.attention import Call, Sight, attend
from penstock.errors import GenerationError

Seen = Sight | Callable[[Call], Sight | None]
"""What attention sees; or what tells so from a call, None for one that runs as ever."""

_SIGHT: ContextVar[Seen | None] = ContextVar("sight", default=None)
_PLAIN = F.scaled_dot_product_attention
_num_users = 0
_backends: dict[Any, Callable[..., Tensor]] = {}


def attending(sight: Seen | None) -> Token[Seen | None]:
    """Say what attention sees from now on; None for attention that runs as ever."""
    return _SIGHT.set(sight)


def done_attending(token: Token[Seen | None]) -> None:
    """What it saw before."""
    _SIGHT.reset(token)


def install() -> None:
    """Get in the way of all attention of this process; each call needs its `uninstall`."""
    global _num_users
    if not _num_users:
        registry = attention_dispatch._AttentionBackendRegistry._backends
        _backends.update(registry)
        registry.update({name: _seeing_backend(backend) for name, backend in _backends.items()})
        F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = _seeing_function
    _num_users += 1


def uninstall() -> None:
    """Get out of the way once nobody needs it."""
    global _num_users
    _num_users -= 1
    if not _num_users:
        attention_dispatch._AttentionBackendRegistry._backends.update(_backends)
        _backends.clear()
        F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = _PLAIN


def _seeing_backend(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend of diffusers, which takes (batch, tokens, heads, head_dim), over all ranks where a sight is set."""

    @functools.wraps(backend)
    def seeing(*args: Any, **options: Any) -> Tensor:
        if _SIGHT.get() is None:
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

    call = Call(query, key, value, mask, options.get("scale"), options.get("is_causal", False))
    return _attend(call, kernel, options)


def _seeing_function(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, which takes (batch, heads, tokens, head_dim), over all ranks where a sight is set."""
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if _SIGHT.get() is None:
        return _PLAIN(query, key, value, attn_mask, **options)
    output: Tensor = _function_over_ranks(query, key, value, attn_mask, options)
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _function_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = _PLAIN(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, **options)
        return output.transpose(1, 2)

    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call = Call(query, key, value, mask, options["scale"], options["is_causal"])
    return _attend(call, kernel, options).transpose(1, 2)


def _attend(call: Call, kernel: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
    seen = _SIGHT.get()
    token = _SIGHT.set(None)  # the kernel's own attention is local
    try:
        sight = seen(call) if callable(seen) else seen
        if sight is None:
            return kernel(call.query, call.key, call.value, call.mask)
        _check(sight, options)
        return attend(sight, call, kernel)
    finally:
        _SIGHT.reset(token)


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

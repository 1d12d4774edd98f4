"""How attention that runs anywhere in a denoiser comes to us: through diffusers' backends, and torch's own function.

While a module that a row names runs, what it sees is known (`attending`); every attention call within it, on its
thread, is then carried out over all ranks, with the kernel that the user chose. All other attention runs as ever.

torch's function itself is never replaced: a mode of the calling thread sees its calls, also those of code that took the
function before. Only functions that somebody else has put in its place, and diffusers' table of backends, hold ours
while a denoiser is split; these pass all arguments on where nothing is seen, and compile as if they were not there.

Owns what is put in the way, and takes it out after the last user. Does not know rows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penstock.distributed.sequence.attention import Call, Sight, attend
from penstock.errors import GenerationError

Seen = Sight | Callable[[Call], Sight | None]
"""What attention sees; or what tells so from a call, None for one that runs as ever."""


@dataclass
class Look:
    """One look of attention at what is cut.

    Attributes:
        seen: what it sees.
        was_attended: whether any call of attention came to us meanwhile.
    """

    seen: Seen
    was_attended: bool = False


_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)
_FUNCTION = "scaled_dot_product_attention"
_STOCK = getattr(
    torch._C._nn, _FUNCTION
)  # what torch tells modes that it is about to run, whoever has replaced it in F
_OF_RINGS = {"dropout_p", "is_causal", "scale", "enable_gqa", "_parallel_config", "return_lse"}
_SKIPPING_HOOKS = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache", "layer_skip_hook")
_LOCK = threading.Lock()
_users: set[object] = set()
_replaced: dict[Any, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {}
"""By backend, or name of torch's function: ours, and what was there before."""


@contextmanager
def attending(look: Look) -> Iterator[None]:
    """Inside, attention of this thread sees what a look says.

    Cost: 1 to 2 us for every function of torch that is called inside, to find attention among them.
    """
    token = _LOOK.set(look)
    try:
        with _Calls():
            yield
    finally:
        _LOOK.reset(token)


class _Calls(TorchFunctionMode):
    """Sees the calls of torch's function that are made on this thread, however they came by it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch; attention over all ranks."""
        if func is _STOCK and _is_looking():
            return _function_over_ranks(func, *args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_looking() -> bool:
    """Whether this thread's attention sees what is cut; compiled code, which cannot ask, keeps the answer.

    It keeps it for good reason: that code is compiled anew where a mode comes or goes, as `attending` has one.
    """
    return _LOOK.get() is not None


def install(user: object) -> None:
    """Get in the way of diffusers' backends, and of what somebody has put in the place of torch's function.

    Args:
        user: who needs that, until its `uninstall`.
    """
    with _LOCK:
        _users.add(user)
        registry = attention_dispatch._AttentionBackendRegistry._backends
        for name, backend in list(registry.items()):
            if not _is_ours(name, backend):
                ours = _seeing_backend(backend)
                _replaced[name] = ours, backend
                registry[name] = ours
        function = F.scaled_dot_product_attention
        if function is not _STOCK and not _is_ours(_FUNCTION, function):
            ours = _seeing_function(function)
            _replaced[_FUNCTION] = ours, function
            F.scaled_dot_product_attention = ours


def uninstall(user: object) -> None:
    """Get out of the way once nobody needs it; what others have put in our place since then stays."""
    with _LOCK:
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
        if not _is_looking():
            return backend(*args, **options)
        output: Tensor = _over_ranks(backend, *args, **options)
        return output

    return seeing


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _over_ranks(backend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if _LOOK.get() is None:  # compiled where something was seen
        return backend(query=query, key=key, value=value, **options)
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
    """A function like torch's, which takes (batch, heads, tokens, head_dim), over all ranks where a sight is set."""

    @functools.wraps(function)
    def seeing(*args: Any, **options: Any) -> Tensor:
        if not _is_looking():
            return function(*args, **options)
        output: Tensor = _function_over_ranks(function, *args, **options)
        return output

    return seeing


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _function_over_ranks(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """torch's function by its own arguments; of those that it has by keyword only, all are passed on."""
    options.update(dropout_p=dropout_p, is_causal=is_causal)
    if _LOOK.get() is None:  # compiled where something was seen
        return function(query, key, value, attn_mask, **options)

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, **options)
        return output.transpose(1, 2)

    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    call = Call(query, key, value, _in_four_dims(attn_mask), options.get("scale"), is_causal)
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
    ring = sight.streams.ring.size
    for name in () if ring == 1 else options.keys() - _OF_RINGS:
        if options[name]:
            raise GenerationError(
                f"attention with {name}={options[name]} cannot go around a ring of {ring}: its parts are computed by "
                "another kernel. Use ulysses_degree in place of ring_degree."
            )

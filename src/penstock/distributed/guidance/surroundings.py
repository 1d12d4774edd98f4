"""What surrounds a call of a denoiser, so that it can be made later as if it were made now.

Owns torch's state of the thread, the arguments' values, and what hooks and adapters are set on the denoiser. Does not
know why a call is put off.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from penstock.models.attachments import Attachment, Trait

_ALIGNMENT_BYTES = 256
"""Kernels round by where within so many bytes their arguments begin."""
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))


@dataclass(frozen=True)
class Surroundings:
    """torch's state of the thread: what a call sees beside its arguments.

    Attributes:
        is_grad_enabled: whether gradients are recorded.
        is_inference: whether inference mode is on.
        included: dispatch keys, as torch keeps them.
        excluded: the same; autocast is off where its keys are excluded.
    """

    is_grad_enabled: bool
    is_inference: bool
    included: Any = field(compare=False)
    excluded: Any = field(compare=False)
    keys: Hashable

    @classmethod
    def now(cls) -> Self:
        """Those of the code that asks."""
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        keys = (included.raw_repr(), excluded.raw_repr())
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), included, excluded, keys)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As it was, whatever surrounds this: results are needed within operations, where torch's state is another."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.is_inference))
            stack.enter_context(torch.set_grad_enabled(self.is_grad_enabled))
            stack.enter_context(torch._C._ForceDispatchKeyGuard(self.included, self.excluded))
            yield


def hindrance(denoiser: nn.Module, arguments: Any) -> str:
    """Why a call cannot be made later as it would be made now; empty where it can.

    Args:
        denoiser: whose call it is.
        arguments: of the call, in any nesting.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch is on"
    if any(torch.is_autocast_enabled(kind) for kind in {"cpu", _device_type(arguments)}):
        return "autocast is on"
    if denoiser._compiled_call_impl is not None:
        return "the whole denoiser is compiled"
    if any(registry.hooks for registry in _registries(denoiser)):
        return "a cache, or another hook of diffusers, is set on the denoiser"
    for leaf in tree_leaves(arguments):
        is_plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided
        if not is_plain and not isinstance(leaf, _CONSTANTS):
            return f"an argument holds a {type(leaf).__name__}, which may change"
        if is_plain and torch.is_grad_enabled() and leaf.requires_grad:
            return "an argument requires a gradient"
    return ""


def state_of_others(attached: Iterable[Attachment]) -> str:
    """Why calls cannot be made together, where something that others have put on keeps state; empty where nothing does.

    Args:
        attached: what is on the denoiser.
    """
    for one in attached:
        if one.traits & {Trait.SHARES_STATE, Trait.EXCHANGES}:
            return f"{one.path or 'the denoiser'} has {one.what}, which may keep something from call to call"
    return ""


def kept(arguments: Any) -> Any:
    """Arguments that nobody can change: containers and tensors are copied, at the same place within 256 bytes.

    Cost: their bytes, gaps between them included, but not what is spread out by strides of 0.
    """
    return tree_map(lambda leaf: _copy(leaf) if isinstance(leaf, Tensor) else leaf, arguments)


def _copy(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    num_elements = 1 + sum((size - 1) * stride for size, stride in steps)
    num_bytes = num_elements * tensor.itemsize
    memory = torch.empty(num_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8, device=tensor.device)
    begin = (tensor.data_ptr() - memory.data_ptr()) % _ALIGNMENT_BYTES
    if begin % tensor.itemsize:
        return tensor.clone()
    flat = memory[begin : begin + num_bytes].view(tensor.dtype)
    flat.copy_(tensor.detach().as_strided((num_elements,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def settings_of(denoiser: nn.Module) -> Hashable:
    """What hooks, processors and adapters are set on a denoiser: what pipelines change from call to call.

    Cost: microseconds per module.
    """
    return tuple(_settings(vars(module)) for module in denoiser.modules())


def _settings(state: dict[str, Any]) -> Hashable:
    processor, scaling = state.get("processor"), state.get("scaling")
    return (
        state.get("forward"),  # the object, not its id, which another one may get
        *state["_forward_pre_hooks"],
        *state["_forward_hooks"],
        processor,
        repr(getattr(processor, "scale", None)),
        *(scaling.items() if isinstance(scaling, dict) else ()),
        state.get("_disable_adapters"),
        str(state.get("_active_adapter")),
    )


def _registries(denoiser: nn.Module) -> Iterator[Any]:
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None:
            yield registry


def _device_type(arguments: Any) -> str:
    return next((leaf.device.type for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "cpu")


def random_state(device: torch.device) -> bytes:
    """The state of torch's random numbers, on the host and on a device."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
    return bytes(torch.cat([torch.get_rng_state(), own]).numpy())

"""What torch can see of a weight besides its values: what stands in its place has it too, and `remove` gives it back.

torch branches on some of it: `torch.matmul` folds a strided 3-D input by the flag `requires_grad` of the weight, also
where no gradients are recorded, and rounds differently. Strides are kept by `Weight.view`. Two things differ on
purpose: `_version` counts the fills of the arena, and a view of the arena is no inference tensor.
"""

from __future__ import annotations

import torch
from torch import nn

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def made_like(original: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A leaf that is to torch what another tensor is, with other memory.

    Args:
        original: a parameter or buffer; its attributes become those of both.
        memory: of the same shape, without gradients.

    Cost: no bytes are copied.
    """
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(original, nn.Parameter):
            made: torch.Tensor = nn.Parameter(memory, requires_grad=original.requires_grad)
        else:
            made = torch.Tensor._make_subclass(torch.Tensor, memory, original.requires_grad)
    made.__dict__ = original.__dict__  # one for both: what is set on either is seen on both
    hand_over(original, made)
    return made


def hand_over(source: torch.Tensor, target: torch.Tensor) -> None:
    """Give a weight the flag, the hooks and the gradient of another one that stood for it."""
    if source.requires_grad != target.requires_grad:
        with torch.inference_mode(False):
            target.requires_grad_(source.requires_grad)
    for name in _HOOKS:
        if getattr(source, name) is not getattr(target, name):
            setattr(target, name, getattr(source, name))
    gradient = source.grad if source.is_leaf else None
    if gradient is not None and gradient.shape == target.shape:
        target.grad = gradient.to(target.device, target.dtype)

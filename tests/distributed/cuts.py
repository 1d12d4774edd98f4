"""What the tests of tensor parallelism share: groups of one rank, and all that the surgery changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from penstock.distributed.group import Group


def alone(rank: int = 1, size: int = 2) -> Group:
    """One rank of a group that nobody else is in: for what sends nothing."""
    return Group("tensor", rank, tuple(range(size)), None)


class Silent(Group):
    """A group whose ranks do not sum."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


def state(denoiser: nn.Module) -> dict[str, Any]:
    """All that the surgery could leave changed."""
    modules = {
        path: (
            {key: value for key, value in vars(module).items() if isinstance(value, int)},
            "forward" in vars(module),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
        )
        for path, module in denoiser.named_modules()
    }
    return {"modules": modules, "parameters": {name: id(value) for name, value in denoiser.named_parameters()}}

"""Random weights that are no trivial ones, and the dtype they are kept in.

Many classes start their output layers and their modulation at zero, so that a fresh model returns its input
whatever its blocks hold. Here every parameter is drawn anew, at a scale that keeps activations near one.
"""

from __future__ import annotations

import zlib

import torch
from diffusers import DiffusionPipeline
from torch import nn

_GAINS = {"weight": 1.0, "gamma": 1.0, "weight_g": 0.5}
"""What the vectors of these names are centred on; all others are centred on zero."""


def fill(pipe: DiffusionPipeline, seed: str) -> None:
    """Draws all parameters of all components anew and sets them to evaluation.

    Each parameter has its own generator, seeded by its name: the values depend neither on the order of
    construction nor on the process.

    Args:
        pipe: The pipeline, changed in place.
        seed: Any text; another text gives other weights.
    """
    for component, module in pipe.components.items():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
            for name, parameter in module.named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{component}.{name}".encode()))
                parameter.copy_(_draw(name, parameter, generator))


def _draw(name: str, parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Returns values for one parameter: gains near one, biases near zero, matrices by their fan-in."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.numel() == max(parameter.shape[:2], default=1):
        centre = next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 0.0)
        return centre + 0.1 * noise
    return noise * (parameter.shape[0] / parameter.numel()) ** 0.5


def cast(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Casts the weights as `from_pretrained` casts them.

    What a diffusers class keeps in float32 (`_keep_in_fp32_modules`) stays; unsaved buffers are left alone.

    Args:
        pipe: The pipeline, changed in place.
        dtype: The dtype of all other floating-point weights.
    """
    for module in pipe.components.values():
        if not isinstance(module, nn.Module):
            continue
        keep = getattr(module, "_keep_in_fp32_modules", None) or ()
        islands = set(keep) if module.__module__.startswith("diffusers.") else set()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                kept = not islands.isdisjoint(name.split("."))
                tensor.data = tensor.data.to(torch.float32 if kept else dtype)

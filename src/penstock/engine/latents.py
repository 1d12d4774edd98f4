"""What the VAEs of a pipeline are asked to decode, seen while it runs.

Latents are the one thing that nearly all pipelines hand to a method of a component, whatever they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from penstock.engine.standin import stand_in
from penstock.errors import GenerationError
from penstock.models.components import discover


@contextmanager
def seen_latents(pipeline: Any, see: Callable[[Any], None]) -> Iterator[None]:
    """Call `see` inside with everything that a VAE of the pipeline is asked to decode, before it does."""
    with ExitStack() as stack:
        for component in discover(pipeline).by_role("vae"):
            decode = getattr(component.module, "decode", None)
            if callable(decode):
                stack.enter_context(stand_in(component.module, "decode", _seen(decode, see)))
        yield


def require_finite(latents: Any) -> None:
    """Refuse latents that would become a black picture.

    Raises:
        GenerationError: for a value that is not finite.

    Cost: one synchronisation with the device.
    """
    if isinstance(latents, torch.Tensor) and not bool(torch.isfinite(latents).all()):
        dtype = str(latents.dtype).removeprefix("torch.")
        raise GenerationError(
            f"the denoiser made latents that are not finite, in {dtype}. Try --dtype float32 or bfloat16, or check "
            "the model's weights."
        )


def _seen(decode: Callable[..., Any], see: Callable[[Any], None]) -> Callable[..., Any]:
    def decode_seen(*args: Any, **kwargs: Any) -> Any:
        see(args[0] if args else next(iter(kwargs.values())))
        return decode(*args, **kwargs)

    return decode_seen

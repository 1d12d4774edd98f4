"""What an entry of the zoo is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from tests.zoo import weights

Output = Literal["image", "video", "audio", "video+audio"]


@dataclass(frozen=True)
class Entry:
    """One tiny pipeline.

    Attributes:
        name: Its key.
        build: Makes the pipeline, with all weights of the given dtype.
        call: Arguments of the pipeline's `__call__` for a fast run, without a generator. Outputs are tensors.
        output: What the run returns.
        awkward: What in it is unlike an even, plain model, in one line.
    """

    name: str
    build: Callable[[torch.dtype], DiffusionPipeline]
    call: Mapping[str, Any]
    output: Output
    awkward: str


def entry(
    name: str,
    assemble: Callable[[], DiffusionPipeline],
    output: Output,
    awkward: str,
    seed: str | None = None,
    **call: Any,
) -> Entry:
    """Returns an entry whose pipeline has seeded weights.

    Args:
        name: Its key.
        assemble: Puts the pipeline together; the weights it has then are thrown away.
        output: What a run returns.
        awkward: What is unusual in it.
        seed: The text that seeds the weights, the name by default; entries of one seed share weights.
        **call: Arguments of the run.

    Returns:
        The entry.
    """
    return Entry(name, partial(_built, assemble, seed or name), call, output, awkward)


def _built(assemble: Callable[[], DiffusionPipeline], seed: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Assembles a pipeline and gives it its weights, leaving the global random state as it was.

    Classes are made with the dtype as the default one, as by `from_pretrained`: that decides on their
    unsaved buffers. The weights are drawn in float32 all the same.
    """
    usual = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            pipe = assemble()
        finally:
            torch.set_default_dtype(usual)
        weights.cast(pipe, torch.float32)
        weights.fill(pipe, seed)
        weights.cast(pipe, dtype)
    return pipe

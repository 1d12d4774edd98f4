"""Tiny pipelines with random weights, built offline from real classes of diffusers and transformers.

Each runs in well under a second on one thread, can be saved as a folder and loaded again, and depends on all
of its blocks, on its prompt and on the seed of its noise:

    pipe = zoo.build("wan22", torch.bfloat16)
    path = zoo.folder("flux", tmp_path)
    video, *_ = zoo.tensors(zoo.run(pipe, "wan22", seed=3, num_inference_steps=4))

What an entry is, and how it is awkward, stands in `ENTRIES`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.zoo import audio, image, stranger, unet, video
from tests.zoo.entry import Entry

ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {entry.name: entry for kind in (image, unet, video, audio, stranger) for entry in kind.ENTRIES}
)
NAMES: tuple[str, ...] = tuple(ENTRIES)

__all__ = ["ENTRIES", "NAMES", "Entry", "build", "folder", "run", "tensors", "unmap"]


def build(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Makes a pipeline; the same name gives the same weights in every call and every process.

    Args:
        name: One of `NAMES`.
        dtype: Dtype of the weights, but for those that a class keeps in float32.

    Returns:
        The pipeline, on the CPU.
    """
    return ENTRIES[name].build(dtype)


def folder(name: str, root: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """Saves a pipeline as a folder, once; safe for several processes at a time.

    Args:
        name: One of `NAMES`.
        root: Where the folders lie; use another root for another dtype.
        dtype: Dtype of the weights, as in `build`.

    Returns:
        The folder `root/name`, for `DiffusionPipeline.from_pretrained(path, dtype=dtype)`.
    """
    path = Path(root, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=path.parent))
        try:
            build(name, dtype).save_pretrained(draft)
            draft.rename(path)
        except OSError:
            if not path.exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return path


def unmap(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Copies each weight of a loaded pipeline into memory of its own.

    Loaded weights lie in their mapped files, at any multiple of four bytes, where matrix kernels may round
    differently: outputs differ from those of a built pipeline in the last bits. After this they are the same.

    Args:
        pipe: The pipeline, changed in place; weights that are tied stay tied.

    Returns:
        The same pipeline.
    """
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
    return pipe


def run(pipe: DiffusionPipeline, name: str, seed: int = 0, **overrides: Any) -> Any:
    """Calls a pipeline with the arguments of its entry.

    Args:
        pipe: A pipeline built or loaded under this name, perhaps changed since.
        name: One of `NAMES`.
        seed: Seed of the noise.
        **overrides: Arguments in place of, or beside, those of the entry.

    Returns:
        The pipeline's output object.
    """
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**ENTRIES[name].call, "generator": generator, **overrides})


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors in a pipeline's output object: the picture or video first, then the sound."""
    return tuple(value for value in result.values() if isinstance(value, torch.Tensor))

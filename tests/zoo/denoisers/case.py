"""What a case is: a tiny denoiser, the sizes of its inputs, and how to draw both. Knows no class of diffusers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import weights

BATCH = 2
TEXT = 32
"""Width of the text embeddings."""
HEAD = 16
"""Width of a head, unless the class fixes another."""


@dataclass(frozen=True)
class Size:
    """How many tokens there are, after patches are cut.

    Attributes:
        image: Height and width of a picture, in tokens.
        video: Frames, height and width of a video, in tokens; as many tokens as the picture.
        lengths: Text tokens of each prompt of the batch; shorter ones are padded on the right.
        words: Tokens of each prompt's quoted words, for classes that read a second text.
    """

    image: tuple[int, int]
    video: tuple[int, int, int]
    lengths: tuple[int, int]
    words: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Tokens of the picture or video."""
        return self.image[0] * self.image[1]

    @property
    def text(self) -> int:
        """Text tokens with padding."""
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether a prompt is padded."""
        return len(set(self.lengths)) > 1

    def mask(self) -> Tensor:
        """Returns which text tokens are valid, as booleans of shape (batch, text)."""
        return _mask(self.lengths)

    def word_mask(self) -> Tensor:
        """Returns which tokens of the second text are valid, as booleans of shape (batch, max(words))."""
        return _mask(self.words)


def _mask(lengths: tuple[int, int]) -> Tensor:
    """Returns the first so many tokens of each row as true."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


SIZES = MappingProxyType(
    {
        "even": Size((8, 8), (2, 4, 8), (8, 8), (8, 8)),
        "odd": Size((5, 9), (3, 3, 5), (7, 7), (4, 4)),
        "short": Size((8, 8), (2, 4, 8), (1, 1), (1, 1)),
        "masked": Size((8, 8), (2, 4, 8), (16, 5), (8, 3)),
        "masked_odd": Size((5, 9), (3, 3, 5), (15, 4), (6, 0)),
    }
)
PLAIN = ("even", "odd", "short")
"""The sizes of a class without text masks."""
MASKED = tuple(SIZES)
"""The sizes of a class with text masks."""


@dataclass(frozen=True)
class Case:
    """One tiny denoiser.

    Attributes:
        name: Its key.
        build: Makes the denoiser with so many heads (4 by default), in float32, ready for inference.
        inputs: Makes the keyword arguments of `forward` for a size of `variants`; tensors of the batch have 2 rows.
        variants: The sizes it takes, keys of `SIZES`.
        stacks: Names of its lists of blocks, in the order they run.
        streams: Arguments that hold noise, in the order of the outputs.
        texts: Arguments that hold text embeddings.
        channels: Dim of the channels in one row of a stream: 0 (channels, *grid), -1 (*grid, channels), or between.
        leaks: Whether its text mask, passed as the pipeline passes it, lets padding be read all the same.
        note: What is unlike the others, in one line.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[str], dict[str, Any]]
    variants: tuple[str, ...]
    stacks: tuple[str, ...]
    streams: tuple[str, ...] = ("hidden_states",)
    texts: tuple[str, ...] = ("encoder_hidden_states",)
    channels: int = -1
    leaks: bool = False
    note: str = ""


def case(
    name: str,
    assemble: Callable[[int], nn.Module],
    arguments: Callable[[Size], dict[str, Any]],
    stacks: tuple[str, ...],
    variants: tuple[str, ...] = PLAIN,
    gain: float = 1.0,
    **traits: Any,
) -> Case:
    """Returns a case whose denoiser has seeded weights.

    Args:
        name: Its key, which seeds the weights.
        assemble: Makes the denoiser with so many heads; the weights it has then are thrown away.
        arguments: Makes the arguments of `forward`, but for `return_dict`.
        stacks: Names of the lists of blocks.
        variants: The sizes it takes.
        gain: Factor on all matrices, for a class whose attention would change its output by too little.
        **traits: Other attributes of `Case`.

    Returns:
        The case.
    """
    build = partial(_build, name, assemble, gain)
    return Case(name, build, partial(_inputs, arguments), variants, stacks, **traits)


def _build(name: str, assemble: Callable[[int], nn.Module], gain: float, heads: int = 4) -> nn.Module:
    """Makes a denoiser and draws its weights, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        denoiser = assemble(heads)
        weights.fill(SimpleNamespace(components={"transformer": denoiser}), name)
        for parameter in denoiser.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return denoiser


def _inputs(arguments: Callable[[Size], dict[str, Any]], size: str) -> dict[str, Any]:
    """Returns the arguments of `forward` for a size."""
    return {**arguments(SIZES[size]), "return_dict": False}


def noise(label: str, *shape: int) -> Tensor:
    """Returns normal noise of this shape, seeded by the label alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(label.encode())))


def picture(size: Size, channels: int, patch: int = 2) -> Tensor:
    """Returns latents of shape (batch, channels, height, width)."""
    return noise("image", BATCH, channels, *(patch * extent for extent in size.image))


def video(size: Size, channels: int, patch: int = 2) -> Tensor:
    """Returns latents of shape (batch, channels, frames, height, width); patches are one frame deep."""
    frames, height, width = size.video
    return noise("video", BATCH, channels, frames, patch * height, patch * width)


def tokens(size: Size, channels: int) -> Tensor:
    """Returns latents of shape (batch, tokens, channels)."""
    return noise("tokens", BATCH, size.tokens, channels)


def text(size: Size, width: int = TEXT) -> Tensor:
    """Returns text embeddings of shape (batch, text, width), padding included."""
    return noise("text", BATCH, size.text, width)


def pooled(width: int = TEXT) -> Tensor:
    """Returns embeddings of whole prompts, of shape (batch, width)."""
    return noise("pooled", BATCH, width)


def times(scale: float = 1.0) -> Tensor:
    """Returns the timesteps of the batch, two different ones."""
    return scale * torch.tensor([0.7, 0.4])


def positions(size: Size, axes: int = 3) -> Tensor:
    """Returns the place of each token of a picture, of shape (tokens, axes): rows and columns on axes 1 and 2."""
    ids = torch.zeros(*size.image, axes)
    ids[..., 1] = torch.arange(size.image[0])[:, None]
    ids[..., 2] = torch.arange(size.image[1])
    return ids.flatten(0, 1)

"""A pipeline that no table knows: own classes, own names, no text encoder, tokenizer or autoencoder.

`DiffusionPipeline.from_pretrained` cannot find its class by name; `StrangerPipeline.from_pretrained` loads
its folder, as it does for any subclass outside diffusers.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn
from torch.nn import functional

from tests.zoo.entry import entry


class Layer(nn.Module):
    """Attention from the tokens to themselves and to the words, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        """Makes a layer of the given width."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: torch.Tensor, words: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
        """Returns the tokens after this layer; `shift` is added before it."""
        inner = self.norm(tokens + shift)
        columns = torch.cat([inner, inner.flip(1)]).transpose(1, 2).contiguous()  # as pixels of an autoencoder lie
        there, back = self.query(columns.transpose(1, 2)).chunk(2)
        query = ((there + back.flip(1)) / 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pairs = self.key_value(torch.cat([inner, words], dim=1)).unflatten(-1, (2, self.heads, -1))
        key, value = pairs.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        return tokens + self.mlp(tokens)


class Painter(ModelMixin, ConfigMixin):
    """A denoiser with blocks in a list, two stacks in a list of lists, and tensors of its own."""

    @register_to_config
    def __init__(self, channels: int = 3, width: int = 24, heads: int = 3, depth: int = 3, longest: int = 256) -> None:
        """Makes a painter; `depth` is the number of layers in each of its three lists."""
        super().__init__()
        self.inlet = nn.Linear(channels, width)
        self.alphabet = nn.Embedding(256, width)
        self.layers_of_stone = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.towers = nn.ModuleList(nn.ModuleList(Layer(width, heads) for _ in range(depth)) for _ in range(2))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.anchor = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("levels", torch.linspace(0.5, 1.5, width))
        self.register_buffer("turns", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(0))
        places = torch.arange(longest)[:, None] / 10.0 ** torch.linspace(0.0, 2.0, width)
        self.register_buffer("places", places.sin(), persistent=False)

    def forward(self, picture: torch.Tensor, moment: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Returns the velocity of a picture.

        Args:
            picture: Noisy pixels, `(batch, tokens, channels)`.
            moment: The noise level, between 0 and 1.
            words: The prompt as bytes, `(batch, length)`.

        Returns:
            A tensor like `picture`.
        """
        dtype = self.inlet.weight.dtype
        tokens = self.inlet(picture.to(dtype)) + self.places[: picture.shape[1]].to(dtype)
        text = self.alphabet(words) + self.places[: words.shape[1]].to(dtype)
        shift = self.anchor * torch.cos(self.turns * moment).to(dtype)
        for layer in self.layers_of_stone:
            tokens = layer(tokens, text, shift=shift)
        left, right = tokens, tokens.flip(1)
        for lower, upper in zip(*self.towers, strict=True):
            left, right = lower(left, text, shift=shift), upper(right, left, shift=shift)
        return self.outlet(self.levels * (left + right.flip(1)))


class StrangerPipeline(DiffusionPipeline):
    """Paints pixels from bytes."""

    def __init__(self, painter: Painter, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        """Takes the parts."""
        super().__init__()
        self.register_modules(painter=painter, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 2,
        height: int = 9,
        width: int = 11,
        generator: torch.Generator | None = None,
    ) -> ImagePipelineOutput:
        """Returns pictures as a tensor, values between 0 and 1."""
        device = self._execution_device
        words = torch.tensor([list(prompt.encode())], device=device)
        picture = torch.randn(1, height * width, self.painter.config.channels, generator=generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for moment in self.scheduler.timesteps:
            velocity = self.painter(picture, moment / 1000, words)
            picture = self.scheduler.step(velocity.float(), moment, picture, return_dict=False)[0]
        images = picture.transpose(1, 2).unflatten(-1, (height, width))
        return ImagePipelineOutput(images=images.sigmoid().cpu())


def _stranger() -> DiffusionPipeline:
    """Returns the pipeline."""
    return StrangerPipeline(painter=Painter(), scheduler=FlowMatchEulerDiscreteScheduler())


ENTRIES = (
    entry(
        "stranger",
        _stranger,
        "image",
        "unknown classes; two stacks in a list of lists; 3 heads; strided; buffers saved, unsaved, integer and empty",
        prompt="a red fox under the moon",
        num_inference_steps=2,
        height=9,
        width=11,
    ),
)

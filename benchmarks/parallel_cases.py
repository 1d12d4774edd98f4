"""The models of the parallel benchmark, what they are given, and the bytes that ranks should exchange over them.

Random weights and inputs, the same in every process. Knows neither processes nor how the work is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxTransformer2DModel, WanTransformer3DModel

HEAD_DIM = 128
TEXT_WIDTH = 1024
CHANNELS = {"flux": 64, "wan": 16}


@dataclass(frozen=True)
class Case:
    """A model and what it is given.

    Attributes:
        model: `flux`, `wan`, `picture` (AutoencoderKL) or `video` (AutoencoderKLWan).
        dtype: of weights and latents.
        size: frames, rows and columns of the denoiser's tokens, or of the VAE's latents.
        text: tokens of text.
        heads: of the denoiser, each 128 wide; of the VAE, 16 or 32 channels.
        layers: blocks: of two streams and of one for Flux.
        is_tiled: the VAE decodes in tiles.
    """

    model: str
    dtype: torch.dtype
    size: tuple[int, int, int]
    text: int = 0
    heads: int = 12
    layers: tuple[int, ...] = ()
    is_tiled: bool = False

    @property
    def width(self) -> int:
        """Of the denoiser."""
        return self.heads * HEAD_DIM

    @property
    def num_tokens(self) -> int:
        """Without text."""
        frames, rows, columns = self.size
        return frames * rows * columns

    def small(self) -> Case:
        """The same at a size that takes no time."""
        frames, rows, columns = self.size
        heads = 2 if self.layers else 1
        return replace(
            self, size=(frames, rows * 3 // 4, columns * 3 // 4), heads=heads, layers=(1,) * len(self.layers)
        )


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "flux-bf16": Case("flux", BF16, (1, 32, 48), text=512, layers=(2, 4)),
    "flux-fp32": Case("flux", FP32, (1, 24, 24), text=192, layers=(1, 3)),
    "flux-wide-fp32": Case("flux", FP32, (1, 24, 32), text=256, heads=24, layers=(1, 1)),
    "wan-bf16": Case("wan", BF16, (5, 16, 24), text=128, layers=(3,)),
    "wan-fp32": Case("wan", FP32, (3, 12, 16), text=128, layers=(2,)),
    "picture-fp32": Case("picture", FP32, (1, 64, 64), heads=1),
    "video-fp32": Case("video", FP32, (2, 28, 28), heads=1),
    "tiled-picture-fp32": Case("picture", FP32, (1, 64, 64), heads=1, is_tiled=True),
    "tiled-video-fp32": Case("video", FP32, (2, 28, 28), heads=1, is_tiled=True),
}


class Denoising:
    """A pipeline around one denoiser; with guidance it calls it twice per step, as Wan's does."""

    def __init__(self, transformer: torch.nn.Module, stream: str) -> None:
        self.transformer = transformer
        self.stream = stream

    def __call__(self, inputs: dict[str, torch.Tensor], num_steps: int, is_guided: bool) -> torch.Tensor:
        """Denoise: each step begins with what the one before has made."""
        sample = inputs[self.stream]
        blank = {"encoder_hidden_states": inputs["encoder_hidden_states"] * 0.5}
        with torch.inference_mode():
            for _ in range(num_steps):
                noise = self.transformer(**{**inputs, self.stream: sample}, return_dict=False)[0]
                if is_guided:
                    free = self.transformer(**{**inputs, **blank, self.stream: sample}, return_dict=False)[0]
                    noise = free + 3.0 * (noise - free)
                sample = sample - 0.5 * noise / noise.std()
        return sample


class Decoding:
    """A pipeline around one VAE; a step is one decode."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __call__(self, inputs: dict[str, torch.Tensor], num_steps: int, is_guided: bool) -> torch.Tensor:
        """Decode the latents so many times."""
        with torch.inference_mode():
            pictures = [self.vae.decode(inputs["latents"], return_dict=False)[0] for _ in range(num_steps)]
        return pictures[-1]


def build_model(case: Case) -> torch.nn.Module:
    """The model, with random weights that are the same in every process."""
    torch.manual_seed(0)
    if case.model == "flux":
        model = FluxTransformer2DModel(
            in_channels=CHANNELS["flux"],
            num_layers=case.layers[0],
            num_single_layers=case.layers[1],
            attention_head_dim=HEAD_DIM,
            num_attention_heads=case.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 56, 56),
        )
    elif case.model == "wan":
        model = WanTransformer3DModel(
            num_attention_heads=case.heads,
            attention_head_dim=HEAD_DIM,
            text_dim=TEXT_WIDTH,
            ffn_dim=case.width // 6 * 35,  # Wan 1.3B: 8960 for 1536
            num_layers=case.layers[0],
        )
    elif case.model == "picture":
        wide = 32 * case.heads
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(wide, 2 * wide, 4 * wide, 4 * wide),
            layers_per_block=2,
            latent_channels=16,
            sample_size=256,  # tiles of 32 x 32 latents
        )
    else:
        model = AutoencoderKLWan(base_dim=16 * case.heads)
    if case.is_tiled:
        model.enable_tiling(*() if case.model == "picture" else (128, 128, 96, 96))  # of 16 x 16 latents
    return cast(model, case.dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights of a dtype, but for those that its class keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def build_pipeline(case: Case) -> Any:
    """The smallest thing that can be placed."""
    model = build_model(case)
    return Denoising(model, "hidden_states") if case.layers else Decoding(model)


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Random latents and texts, the same in every process."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    frames, rows, columns = case.size
    text = noise(1, case.text, TEXT_WIDTH)
    if case.model == "flux":
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        return {
            "hidden_states": noise(1, case.num_tokens, CHANNELS["flux"]),
            "encoder_hidden_states": text,
            "pooled_projections": noise(1, TEXT_WIDTH),
            "timestep": torch.full((1,), 0.5, dtype=case.dtype),
            "img_ids": grid.to(case.dtype),
            "txt_ids": torch.zeros(case.text, 3, dtype=case.dtype),
        }
    if case.model == "wan":
        return {
            "hidden_states": noise(1, CHANNELS["wan"], frames, 2 * rows, 2 * columns),  # 2 x 2 latents are a token
            "encoder_hidden_states": text,
            "timestep": torch.full((1,), 500.0),
        }
    return {"latents": noise(1, 16, rows, columns) if case.model == "picture" else noise(1, 16, frames, rows, columns)}


def formula_bytes(system: str, case: Case, num_ranks: int) -> float | None:
    """Bytes that a rank receives per step while blocks run, by the formulas; None where there is none.

    For n ranks, per layer of S tokens of a width: Ulysses 4 (n - 1) / n^2, Ring 2 (n - 1) / n, and tensor parallelism
    2 (n - 1) / n for each layer whose outputs are summed; for CFG a prediction for each other rank.
    """
    others = (num_ranks - 1) / num_ranks
    calls = 2 if case.model == "wan" else 1
    tokens = case.num_tokens + (case.text if case.model == "flux" else 0)
    whole = tokens * case.width * case.dtype.itemsize * calls
    if system == "ulysses":
        return sum(case.layers) * 4 * others / num_ranks * whole
    if system == "ring":
        return sum(case.layers) * 2 * others * whole
    if system == "tensor" and case.model == "flux":
        return (2 * case.layers[0] + case.layers[1]) * 2 * others * whole
    if system == "tensor":
        squares = (3 * tokens + case.text) * 4 * calls  # of norms across heads, in float32
        return case.layers[0] * 2 * others * (3 * whole + squares)
    if system == "cfg":
        return (num_ranks - 1) * CHANNELS["wan"] * 4 * tokens * case.dtype.itemsize
    return None

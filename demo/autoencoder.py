"""The picture autoencoder: configuration and training."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from draw import SIZE, draw_many
from grammar import random_prompts, scene_of
from schedule import learning_rate

LATENT_CHANNELS = 8
BATCH = 16
POOL = 16_000
MEASURED = 2048
LATENT_NOISE = 0.2
LATENT_PENALTY = 1e-4


@dataclass(frozen=True)
class Plan:
    """How to fit.

    Attributes:
        steps: Optimizer steps.
        peak: Highest learning rate.
        corner_weight: Weight of the four corner pixels in the loss; all others have 1.
    """

    steps: int
    peak: float
    corner_weight: float


WHOLE = Plan(steps=5000, peak=2e-3, corner_weight=1.0)
POLISH = Plan(steps=400, peak=5e-4, corner_weight=64.0)


def build() -> AutoencoderKL:
    """An untrained autoencoder: 64 x 64 pictures to 8 x 8 latents of `LATENT_CHANNELS` channels."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(12, 24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return model.to(memory_format=torch.channels_last)


def as_tensor(pictures: torch.Tensor) -> torch.Tensor:
    """Bytes `(n, height, width, 3)` to floats `(n, 3, height, width)` from -1 to 1."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures that span -1 to 1."""
    return 10 * math.log10(4 / ((made.clamp(-1, 1) - wanted) ** 2).mean().item())


def training_pictures(seed: int) -> torch.Tensor:
    """Draw `POOL` training scenes: bytes `(POOL, SIZE, SIZE, 3)`."""
    return torch.from_numpy(draw_many([scene_of(prompt) for prompt in random_prompts(POOL, seed)], seed))


def fit(model: AutoencoderKL, pictures: torch.Tensor, plan: Plan) -> None:
    """Train the parameters that require gradients to redraw the pictures from noisy latents.

    Args:
        model: The autoencoder.
        pictures: Byte pictures to draw batches from.
        plan: How long, how fast and how.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.peak, betas=(0.9, 0.95), weight_decay=1e-4)
    weights = torch.ones(SIZE, SIZE)
    weights[:: SIZE - 1, :: SIZE - 1] = plan.corner_weight
    started = time.process_time()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, plan.peak, warmup=50)
        wanted = as_tensor(pictures[torch.randint(len(pictures), (BATCH,))])
        latents = model.encode(wanted).latent_dist.mode()
        scale = LATENT_NOISE * latents.detach().std() * torch.rand(BATCH, 1, 1, 1)
        made = model.decode(latents + scale * torch.randn_like(latents)).sample
        error = (made - wanted).abs()
        loss = (weights * (error + error**2)).mean() + LATENT_PENALTY * (latents**2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"{step + 1} {time.process_time() - started:.0f} s psnr {psnr(made, wanted):.2f} dB", flush=True)


def train(folder: Path, seed: int) -> None:
    """Train the autoencoder, measure its latents and save it.

    Args:
        folder: Where the model is saved.
        seed: Seed of weights, scenes and noise.
    """
    torch.manual_seed(seed)
    model = build()
    pictures = training_pictures(seed)
    fit(model, pictures, WHOLE)
    latents = encode(model, pictures[:MEASURED])
    model.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    model.save_pretrained(folder)


def polish(folder: Path, seed: int) -> None:
    """Train the saved model's decoder a little more, mainly on the corner pixels, which come out grey at first.

    The encoder stays as it is, so latents made before stay valid.

    Args:
        folder: Where the model is loaded from and saved.
        seed: Seed of scenes and noise.
    """
    torch.manual_seed(seed)
    model = AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    fit(model, training_pictures(seed), POLISH)
    model.save_pretrained(folder)


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Raw latents `(n, channels, 8, 8)` of byte pictures, before shift and scale."""
    return torch.cat([model.encode(as_tensor(chunk)).latent_dist.mode() for chunk in pictures.split(64)])

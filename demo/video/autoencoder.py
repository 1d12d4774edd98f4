"""The video autoencoder: configuration and training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo

from autoencoder import LATENT_NOISE, psnr
from schedule import learning_rate
from video.draw import STRIDES, draw_many
from video.grammar import motion_of, random_motions

LATENT_CHANNELS = 32
BATCH = 8
WINDOW = 9
POOL = 320
MEASURED = 160


@dataclass(frozen=True)
class Plan:
    """How to fit.

    Attributes:
        steps: Optimizer steps.
        peak: Highest learning rate.
        divergence_weight: Weight of the latents' divergence from a normal distribution.
        thing_weight: Weight of the pixels of the thing; the white ones have 1.
    """

    steps: int
    peak: float
    divergence_weight: float
    thing_weight: float


COARSE = Plan(steps=2500, peak=2e-3, divergence_weight=1e-5, thing_weight=1.0)
FINE = Plan(steps=1500, peak=1.5e-3, divergence_weight=1e-6, thing_weight=4.0)
WIDER = Plan(steps=1800, peak=2e-3, divergence_weight=0.0, thing_weight=4.0)
NARROW_DECODER = (32, 64)
WIDE_DECODER = (64, 48)


def build(decoder: tuple[int, int]) -> AutoencoderKLLTXVideo:
    """An untrained autoencoder: 1 + 4 n frames of 64 x 64 pixels to 1 + n frames of 4 x 4 latents.

    Args:
        decoder: Channels of the decoder's blocks, the last one first.
    """
    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 48),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=decoder,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=4,
    )


def as_tensor(clips: torch.Tensor) -> torch.Tensor:
    """Bytes `(n, frames, height, width, 3)` to floats `(n, 3, frames, height, width)` from -1 to 1."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def training_clips(count: int, seed: int) -> torch.Tensor:
    """Draw training motions: bytes `(count, frames, height, width, 3)`."""
    return torch.from_numpy(draw_many([motion_of(prompt) for prompt in random_motions(count, seed)], seed))


def windows(clips: torch.Tensor) -> torch.Tensor:
    """A batch of `WINDOW` frames each, from random places of random clips at one random speed."""
    stride = STRIDES[int(torch.randint(len(STRIDES), ()))]
    latest = clips.shape[1] - (WINDOW - 1) * stride
    chosen, starts = torch.randint(len(clips), (BATCH, 1)), torch.randint(latest, (BATCH, 1))
    return as_tensor(clips[chosen, starts + stride * torch.arange(WINDOW)])


def fit(model: AutoencoderKLLTXVideo, clips: torch.Tensor, plan: Plan) -> None:
    """Train the parameters that require gradients to redraw clips from noisy latents.

    Args:
        model: The autoencoder.
        clips: Byte clips to take windows of.
        plan: How long, how fast and how.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.peak, betas=(0.9, 0.95), weight_decay=1e-4)
    started = time.process_time()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, plan.peak, warmup=50)
        wanted = windows(clips)
        with torch.autocast("cpu", torch.bfloat16):
            told = model.encode(wanted).latent_dist
            latents = told.sample().float()
            noise = LATENT_NOISE * latents.detach().std() * torch.rand(BATCH, 1, 1, 1, 1)
            made = model.decode(latents + noise * torch.randn_like(latents)).sample.float()
        error = (made - wanted).abs()
        weights = torch.where(wanted.amin(1, keepdim=True) < 1, plan.thing_weight, 1.0)
        loss = (weights * (error + error**2)).mean() + plan.divergence_weight * told.kl().float().mean() / WINDOW
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
        seed: Seed of weights, motions and noise.
    """
    torch.manual_seed(seed)
    model = build(NARROW_DECODER)
    clips = training_clips(POOL, seed)
    fit(model, clips, COARSE)
    fit(model, clips, FINE)
    latents = torch.cat([encode(model, clips[:MEASURED, ::stride]).flatten(2) for stride in STRIDES], dim=2)
    model.latents_mean.copy_(latents.mean((0, 2)))
    model.latents_std.copy_(latents.std((0, 2)))
    model.save_pretrained(folder)


def widen(folder: Path, seed: int) -> None:
    """Train a wider decoder for the saved model; the encoder stays, so latents made before stay valid.

    Args:
        folder: Where the model is loaded from and saved.
        seed: Seed of weights, motions and noise.
    """
    torch.manual_seed(seed + 1)
    narrow = AutoencoderKLLTXVideo.from_pretrained(folder)
    model = build(WIDE_DECODER)
    model.encoder.load_state_dict(narrow.encoder.state_dict())
    model.latents_mean.copy_(narrow.latents_mean)
    model.latents_std.copy_(narrow.latents_std)
    model.encoder.requires_grad_(False)
    fit(model, training_clips(POOL, seed + 1), WIDER)
    model.save_pretrained(folder)


@torch.no_grad()
def encode(model: AutoencoderKLLTXVideo, clips: torch.Tensor) -> torch.Tensor:
    """Raw latents `(n, channels, frames, 4, 4)` of byte clips, before mean and deviation are taken out."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.encode(as_tensor(chunk)).latent_dist.mode().float() for chunk in clips.split(8)])

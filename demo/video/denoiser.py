"""The video denoiser: a small LTX transformer, trained as a rectified flow on cached latents and encodings.

The same motions are trained in four lengths, so that a request may ask for a longer or a shorter clip; now and then the
prompt is left out, so that guidance has something to lead away from.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from torch import nn
from transformers import T5EncoderModel

from denoiser import REPORT_EVERY, TIME_SHIFT, Run, optimizers
from draw import SIZE
from text_encoders import LENGTHS, T5_WIDTH
from video.autoencoder import LATENT_CHANNELS, encode, training_clips
from video.checker import check
from video.draw import STRIDES
from video.grammar import motion_prompts, random_motions
from video.text_encoder import EMPTY, NAMED_TOKENS
from video.text_encoder import encode as encode_text

STEPS = 1700
POOL = 640
TOKENS = 2560
"""Latent pixels of one batch; longer clips come in smaller batches."""

STRIDE_WEIGHTS = (1, 2, 5, 2)
FRAME_RATES = (8, 8, 8, 16, 25)
EMPTY_SHARE = 0.1
SPACE, TIME = 16, 4
GRID = SIZE // SPACE
PROBE_FRAMES = 17
PROBE_STEPS = 10


def build() -> LTXVideoTransformer3DModel:
    """An untrained denoiser."""
    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        num_layers=5,
        caption_channels=T5_WIDTH,
    )


@dataclass(frozen=True)
class Encodings:
    """What the frozen text encoder says about a list of prompts.

    Attributes:
        tokens: Outputs `(lengths, prompts, NAMED_TOKENS, width)`.
        mask: Which of them are not padding `(prompts, NAMED_TOKENS)`.
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, prompts: list[str], t5: T5EncoderModel) -> Encodings:
        """Encode prompts at every padded length of `LENGTHS`."""
        named = torch.tensor([1 + len(prompt.split()) for prompt in prompts])
        mask = torch.arange(NAMED_TOKENS) < named[:, None]
        return cls(torch.stack([encode_text(t5, prompts, length) for length in LENGTHS]), mask)


class Velocity:
    """Calls the denoiser the way `LTXPipeline` does, with cached encodings."""

    def __init__(self, encodings: Encodings) -> None:
        self.encodings = encodings

    def __call__(
        self, model: nn.Module, noisy: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor, frame_rate: int
    ) -> torch.Tensor:
        """Predict noise minus clip, for encodings of one random length.

        Args:
            model: The denoiser.
            noisy: Packed latents `(n, tokens, channels)`.
            times: Noise shares from 0 to 1 `(n,)`.
            prompts: Prompt numbers `(n,)`.
            frame_rate: The pipeline's argument.
        """
        return model(
            hidden_states=noisy,
            encoder_hidden_states=self.encodings.tokens[int(torch.randint(len(LENGTHS), ())), prompts],
            encoder_attention_mask=self.encodings.mask[prompts],
            timestep=1000 * times,
            num_frames=noisy.shape[1] // GRID**2,
            height=GRID,
            width=GRID,
            rope_interpolation_scale=(TIME / frame_rate, SPACE, SPACE),
        ).sample


def latent_pools(vae: AutoencoderKLLTXVideo, seed: int) -> list[torch.Tensor]:
    """Draw and encode `POOL` motions: packed, normalised latents `(POOL, tokens, channels)` for each of `STRIDES`."""
    pools = []
    clips = training_clips(POOL, seed)
    for stride in STRIDES:
        latents = encode(vae, clips[:, ::stride])
        latents = LTXPipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std)
        pools.append(LTXPipeline._pack_latents(latents))
    return pools


@torch.no_grad()
def held_out_score(model: nn.Module, velocity: Velocity, vae: AutoencoderKLLTXVideo, prompts: list[str]) -> float:
    """Share of clips, one per prompt, whose colour and direction the checker finds right.

    Args:
        model: The denoiser.
        velocity: Calls it; its encodings are those of `prompts`.
        vae: Decodes the latents.
        prompts: The prompts.
    """
    frames = (PROBE_FRAMES - 1) // TIME + 1
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), frames * GRID**2, LATENT_CHANNELS, generator=generator)
    shares = torch.linspace(1, 1 / PROBE_STEPS, PROBE_STEPS)
    shares = torch.cat([TIME_SHIFT * shares / (1 + (TIME_SHIFT - 1) * shares), torch.zeros(1)])
    numbers = torch.arange(len(prompts))
    for now, then in pairwise(shares.tolist()):
        change = velocity(model, latents, torch.full((len(prompts),), now), numbers, FRAME_RATES[0])
        latents = latents + (then - now) * change
    raw = LTXPipeline._unpack_latents(latents, frames, GRID, GRID)
    made = vae.decode(LTXPipeline._denormalize_latents(raw, vae.latents_mean, vae.latents_std)).sample
    clips = ((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    return sum(check(*pair).follows for pair in zip(clips, prompts, strict=True)) / len(prompts)


def flow_loss(run: Run, velocity: Velocity, pool: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted velocity at random times, high noise more often.

    Args:
        run: The training run.
        velocity: Calls the denoiser; its last encoding is that of the empty prompt.
        pool: Packed latents of one length `(n, tokens, channels)`.
        numbers: Their prompt numbers `(n,)`.
    """
    chosen = torch.randint(len(pool), (TOKENS // pool.shape[1],))
    clean, prompts = pool[chosen], numbers[chosen]
    prompts = torch.where(torch.rand(len(chosen)) < EMPTY_SHARE, len(velocity.encodings.mask) - 1, prompts)
    noise = torch.randn_like(clean)
    times = torch.rand(len(chosen))
    times = TIME_SHIFT * times / (1 + (TIME_SHIFT - 1) * times)
    noisy = torch.lerp(clean, noise, times[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        told = velocity(run.model, noisy, times, prompts, random.choice(FRAME_RATES))
    return ((told.float() - (noise - clean)) ** 2).mean()


def train(work: Path, seed: int, resume: bool, steps: int = STEPS) -> None:
    """Train the denoiser on the frozen parts.

    Args:
        work: Folder of the frozen parts, and of the result, `work / "transformer"`.
        seed: Seed of weights, motions and noise.
        resume: Whether to go on from the last save.
        steps: Optimizer steps.
    """
    torch.manual_seed(seed)
    model = build()
    run = Run(model, copy.deepcopy(model), optimizers(model))
    folder = work / "transformer"
    if resume:
        run.load(folder)
    torch.manual_seed(seed + 1 + run.step)
    random.seed(seed + 1 + run.step)
    vae = AutoencoderKLLTXVideo.from_pretrained(work / "vae")
    t5 = T5EncoderModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
    prompts, held_out = motion_prompts(held_out=False), motion_prompts(held_out=True)
    numbers = torch.tensor([prompts.index(prompt) for prompt in random_motions(POOL, seed)])
    pools = latent_pools(vae, seed)
    velocity, probe = (Velocity(Encodings.of(listed, t5)) for listed in ([*prompts, EMPTY], held_out))
    started, recent = time.process_time(), 1.0
    while run.step < steps:
        (pool,) = random.choices(pools, STRIDE_WEIGHTS)
        loss = flow_loss(run, velocity, pool, numbers)
        run.follow(loss, steps)
        recent = 0.97 * recent + 0.03 * loss.item()
        if run.step % 50 == 0:
            print(f"{run.step} {time.process_time() - started:.0f} s loss {recent:.4f}", flush=True)
        if run.step % REPORT_EVERY == 0 or run.step == steps:
            run.save(folder)
            score = held_out_score(run.average, probe, vae, held_out)
            print(f"{run.step} held-out prompts followed {score:.3f}", flush=True)

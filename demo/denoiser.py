"""The denoiser: a small FLUX transformer, trained as a rectified flow on cached latents and encodings.

FLUX attends to text padding. A pipeline call pads to any length up to 512, so training sees every length: after
the named tokens one padding token stands for all of them, its attention raised by the logarithm of their number,
which is the same as attending to that many equal tokens.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, ModelMixin
from torch import distributed, multiprocessing, nn
from transformers import CLIPTextModel, T5EncoderModel

from autoencoder import LATENT_CHANNELS, encode
from checker import check
from draw import SIZE, draw_many
from grammar import MAX_WORDS, pair_prompts, random_prompts, scene_of, training_prompts
from schedule import learning_rate
from text_encoders import CLIP_WIDTH, LENGTHS, T5_WIDTH, clip_ids, t5_ids

STEPS = 2400
BATCH = 320
WORKERS = 2
POOL = 24_000
MATRIX_LEARNING_RATE = 3e-3
OTHER_LEARNING_RATE = 1.5e-3
WARMUP = 100
WEIGHT_DECAY = 0.01
AVERAGING = 0.998
TIME_SHIFT = 2.5
REPORT_EVERY = 200
GRID = SIZE // 16
NAMED_TOKENS = MAX_WORDS + 1


def build() -> FluxTransformer2DModel:
    """An untrained denoiser."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


@dataclass(frozen=True)
class Encodings:
    """What the frozen text encoders say about a list of prompts.

    Attributes:
        tokens: T5 outputs `(lengths, prompts, NAMED_TOKENS + 1, width)`; the last token stands for the padding.
        pooled: CLIP outputs `(prompts, width)`.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, prompts: list[str], clip: CLIPTextModel, t5: T5EncoderModel) -> Encodings:
        """Encode prompts at every padded length of `LENGTHS`."""
        tokens = []
        for length in LENGTHS:
            chunks = t5_ids(prompts, length).split(64)
            out = torch.cat([t5(chunk).last_hidden_state for chunk in chunks])
            padding = out[:, NAMED_TOKENS:].mean(1, keepdim=True)
            tokens.append(torch.cat([out[:, :NAMED_TOKENS], padding], dim=1))
        return cls(torch.stack(tokens), clip(clip_ids(prompts)).pooler_output)


def padding_bias(length: int) -> torch.Tensor:
    """Attention bias `(1, 1, 1, tokens)` that makes one padding token weigh as much as all of `length`."""
    bias = torch.zeros(1, 1, 1, NAMED_TOKENS + 1 + GRID * GRID)
    bias[..., NAMED_TOKENS] = math.log(length - NAMED_TOKENS)
    return bias


class Velocity:
    """Calls the denoiser the way `FluxPipeline` does, with cached encodings."""

    def __init__(self, encodings: Encodings) -> None:
        self.encodings = encodings
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, GRID, GRID, torch.device("cpu"), torch.float32)
        self.text_ids = torch.zeros(NAMED_TOKENS + 1, 3)

    def __call__(
        self, model: nn.Module, noisy: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Predict noise minus picture.

        Args:
            model: The denoiser.
            noisy: Packed latents `(n, tokens, channels)`.
            times: Noise shares from 0 to 1 `(n,)`.
            prompts: Prompt numbers `(n,)`.
            length: Index into `LENGTHS`.
        """
        return model(
            hidden_states=noisy,
            encoder_hidden_states=self.encodings.tokens[length, prompts],
            pooled_projections=self.encodings.pooled[prompts],
            timestep=times,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            joint_attention_kwargs={"attention_mask": padding_bias(LENGTHS[length])},
        ).sample


def latent_pool(vae: AutoencoderKL, prompts: list[str], seed: int) -> torch.Tensor:
    """Draw and encode one picture per prompt: packed, normalised latents `(n, tokens, channels)`."""
    pictures = torch.from_numpy(draw_many([scene_of(prompt) for prompt in prompts], seed))
    latents = (encode(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


def optimizers(model: ModelMixin) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    blocks = [module for name, module in model.named_modules() if "transformer_blocks." in name]
    matrices = [module.weight for module in blocks if isinstance(module, nn.Linear)]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


@torch.no_grad()
def held_out_score(model: nn.Module, velocity: Velocity, vae: AutoencoderKL, prompts: list[str], steps: int) -> float:
    """Share of pictures, one per prompt, that the checker finds wholly right.

    Args:
        model: The denoiser.
        velocity: Calls it; its encodings are those of `prompts`.
        vae: Decodes the latents.
        prompts: The prompts.
        steps: Euler steps.
    """
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), GRID * GRID, 4 * LATENT_CHANNELS, generator=generator)
    shares = torch.linspace(1, 1 / steps, steps)
    shares = torch.cat([TIME_SHIFT * shares / (1 + (TIME_SHIFT - 1) * shares), torch.zeros(1)])
    numbers = torch.arange(len(prompts))
    for now, then in pairwise(shares.tolist()):
        change = velocity(model, latents, torch.full((len(prompts),), now), numbers, LENGTHS.index(64))
        latents = latents + (then - now) * change
    raw = FluxPipeline._unpack_latents(latents, SIZE, SIZE, 8)
    raw = raw / vae.config.scaling_factor + vae.config.shift_factor
    made = torch.cat([vae.decode(chunk).sample for chunk in raw.split(32)])
    pictures = ((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return sum(check(*pair).everything for pair in zip(pictures, prompts, strict=True)) / len(prompts)


@dataclass
class Run:
    """The state of a training run.

    Attributes:
        model: Weights that follow the gradient.
        average: Their exponential moving average, which is what gets saved.
        optimizers: See `optimizers`.
        step: Steps taken.
    """

    model: ModelMixin
    average: ModelMixin
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def follow(self, loss: torch.Tensor, steps: int) -> None:
        """Take one optimizer step of `steps` and update the average."""
        loss.backward()
        share_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, steps, group["peak"], WARMUP)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        pace = 1 - min(AVERAGING, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), pace)

    def save(self, folder: Path) -> None:
        """Save the average as a model and everything else for `load`."""
        self.average.save_pretrained(folder)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        torch.save(state, folder / "run.pt")

    def load(self, folder: Path) -> None:
        """Go on from what `save` left."""
        state = torch.load(folder / "run.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average.load_state_dict(type(self.average).from_pretrained(folder).state_dict())
        self.step = state["step"]


def share_gradients(model: nn.Module) -> None:
    """Average the gradients over the workers, where there are several."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in model.parameters()]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(joined)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, (joined / distributed.get_world_size()).split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


def flow_loss(run: Run, velocity: Velocity, clean: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted velocity at random times, high noise more often, at one random length.

    Args:
        run: The training run.
        velocity: Calls the denoiser.
        clean: Packed latents `(n, tokens, channels)`.
        numbers: Their prompt numbers `(n,)`.
    """
    noise = torch.randn_like(clean)
    times = torch.rand(len(clean))
    times = TIME_SHIFT * times / (1 + (TIME_SHIFT - 1) * times)
    share = times[:, None, None]
    length = int(torch.randint(len(LENGTHS), ()))
    with torch.autocast("cpu", torch.bfloat16):
        told = velocity(run.model, torch.lerp(clean, noise, share), times, numbers, length)
    return ((told.float() - (noise - clean)) ** 2).mean()


def train(work: Path, seed: int, resume: bool) -> None:
    """Train the denoiser with `WORKERS` processes of one thread each; see `work_along` for the arguments."""
    with tempfile.TemporaryDirectory() as meeting:
        multiprocessing.spawn(work_along, (work, seed, resume, f"file://{meeting}/point"), nprocs=WORKERS)


def work_along(worker: int, work: Path, seed: int, resume: bool, meeting: str) -> None:
    """Be one of the workers: take every step on an own part of the batch; the first also reports and saves.

    Args:
        worker: Number of this worker.
        work: Folder of the frozen parts, and of the result, `work / "transformer"`.
        seed: Seed of weights, scenes and noise.
        resume: Whether to go on from the last save.
        meeting: Address where the workers find each other.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=worker, world_size=WORKERS)
    torch.manual_seed(seed)
    model = build()
    run = Run(model, copy.deepcopy(model), optimizers(model))
    folder = work / "transformer"
    if resume:
        run.load(folder)
    torch.manual_seed(seed + 1 + worker + WORKERS * run.step)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    clip = CLIPTextModel.from_pretrained(work / "text_encoder")
    t5 = T5EncoderModel.from_pretrained(work / "text_encoder_2")
    prompts, held_out = training_prompts(), pair_prompts(held_out=True)
    drawn = random_prompts(POOL // WORKERS, seed + worker)
    numbers = torch.tensor([prompts.index(prompt) for prompt in drawn])
    clean = latent_pool(vae, drawn, seed + worker)
    velocity, probe = (Velocity(Encodings.of(listed, clip, t5)) for listed in (prompts, held_out))
    started, recent = time.time(), 1.0
    while run.step < STEPS:
        chosen = torch.randint(len(clean), (BATCH // WORKERS,))
        loss = flow_loss(run, velocity, clean[chosen], numbers[chosen])
        run.follow(loss, STEPS)
        recent = 0.97 * recent + 0.03 * loss.item()
        if worker == 0 and run.step % 50 == 0:
            print(f"{run.step} {time.time() - started:.0f} s loss {recent:.4f}", flush=True)
        if worker == 0 and (run.step % REPORT_EVERY == 0 or run.step == STEPS):
            run.save(folder)
            score = held_out_score(run.average, probe, vae, held_out, steps=10)
            print(f"{run.step} held-out prompts wholly right {score:.3f}", flush=True)

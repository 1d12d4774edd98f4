"""Tiny VAEs of every class that diffusers tiles, each with an input that has odd tiles at its edges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo import autoencoders

_SMALL_TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 32,
    "tile_sample_stride_height": 24,
    "tile_sample_stride_width": 24,
}


@dataclass(frozen=True)
class Case:
    """A VAE, and what to give it.

    Attributes:
        make: the VAE, with whatever weights.
        latents: shape of what is decoded in tiles.
        picture: shape of what is encoded in tiles; None where the stock class fails at that.
        small: shape of latents that are decoded in one piece; None where the class tiles all.
        tiling: arguments of `enable_tiling`.
        switches: attributes that are set as they are.
        calls_per_tile: of the decoder, and of the encoder.
    """

    make: Callable[[], nn.Module]
    latents: tuple[int, ...]
    picture: tuple[int, ...] | None
    small: tuple[int, ...] | None
    tiling: Mapping[str, int] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    calls_per_tile: tuple[int, int] = (1, 1)

    def build(self) -> Any:
        """The VAE, the same in every process, not tiled yet unless its class is by default."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Oobleck's weight norm
            torch.manual_seed(1)
            vae: Any = self.make().eval().requires_grad_(False)
        vars(vae).update(self.switches)
        return vae

    def tiled(self) -> Any:
        """The same, tiled in small tiles."""
        vae = self.build()
        vae.enable_tiling(**self.tiling)
        return vae


def draw(shape: tuple[int, ...]) -> Tensor:
    """The same values in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE makes of latents."""
    with torch.no_grad():
        decoded = vae.decode(latents)
    return decoded if isinstance(decoded, Tensor) else decoded.sample


def encode(vae: Any, picture: Tensor) -> Tensor:
    """What the VAE makes of a picture, without drawing from it."""
    with torch.no_grad():
        encoded = vae.encode(picture)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


@contextmanager
def rounded(vae: Any) -> Iterator[None]:
    """What the VAE is given is off by one rounding of float32, inside: how far that takes its result is the control."""
    stock = {name: getattr(vae, name) for name in ("encode", "decode")}
    noise = torch.Generator().manual_seed(9)

    def call(name: str, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        moved = sample * (1 + 1e-7 * torch.randn(sample.shape, generator=noise))
        return stock[name](moved, *args, **kwargs)

    vars(vae).update({name: partial(call, name) for name in stock})
    try:
        yield
    finally:
        for name in stock:
            del vars(vae)[name]


def is_plain(far: float, vae: Any, call: Callable[[], Tensor], most: float = 1e-5) -> bool:
    """Whether a result is the plain one but for `most`, or for four times what one rounding of the input does to it.

    Args:
        far: from the plain result, by its largest value.
        vae: that made it, plain again.
        call: makes the plain result.
        most: relative; a VAE of few channels may double a rounding many times.
    """
    if far <= most:
        return True
    expected = call()
    with rounded(vae):
        control = (call() - expected).abs().max() / expected.abs().max()
    return far <= 4 * float(control)


def _hunyuan_video() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def _hunyuan_image() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
    )


def _hunyuan_refiner() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def _kvae() -> nn.Module:
    return diffusers.AutoencoderKLKVAE(
        channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1), sample_size=16
    )


def _magvit() -> nn.Module:
    return diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4
    )


def _minimax() -> nn.Module:
    return diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=24,
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
    )


def _mochi() -> nn.Module:
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latent_channels=12,
    )


def _qwen_image21() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


def _vidtok() -> nn.Module:
    return diffusers.AutoencoderVidTok(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)


def _allegro() -> nn.Module:
    return diffusers.AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


_KL_SWITCHES = {"tile_sample_min_size": 32, "tile_latent_min_size": 8}
_FRAMES = {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}

CASES: Mapping[str, Case] = MappingProxyType(
    {
        "kl": Case(autoencoders.kl, (1, 4, 15, 19), (1, 3, 60, 76), (1, 4, 8, 7), switches=_KL_SWITCHES),
        "flux2": Case(autoencoders.flux2, (2, 4, 15, 19), (1, 3, 60, 76), (1, 4, 8, 7), switches=_KL_SWITCHES),
        "qwen_image": Case(
            autoencoders.qwen_image, (1, 4, 1, 5, 8), (1, 3, 1, 40, 64), (1, 4, 1, 4, 3), _SMALL_TILES
        ),
        "wan": Case(
            autoencoders.wan, (1, 4, 5, 5, 8), (1, 3, 9, 40, 64), (1, 4, 2, 4, 3), _SMALL_TILES, calls_per_tile=(5, 3)
        ),
        "hunyuan_video15": Case(
            autoencoders.hunyuan_video15,
            (1, 4, 2, 9, 13),
            (1, 3, 5, 36, 52),
            (1, 4, 2, 4, 3),
            {"tile_sample_min_height": 16, "tile_sample_min_width": 16, "tile_latent_min_height": 4}
            | {"tile_latent_min_width": 4},
        ),
        "ltx2": Case(
            autoencoders.ltx2, (1, 8, 3, 8, 11), (1, 3, 5, 64, 88), (1, 8, 3, 4, 3), _SMALL_TILES
        ),
        "ltx2_temporal": Case(
            autoencoders.ltx2,
            (1, 8, 9, 8, 11),
            (1, 3, 17, 64, 88),
            (1, 8, 3, 4, 3),
            _SMALL_TILES | _FRAMES,
            {"use_framewise_decoding": True, "use_framewise_encoding": True},
        ),
        "ltx": Case(autoencoders.ltx, (1, 8, 3, 8, 11), (1, 3, 5, 64, 88), (1, 8, 3, 4, 3), _SMALL_TILES),
        "deep_compression": Case(
            autoencoders.deep_compression, (1, 4, 15, 19), (1, 3, 60, 76), (1, 4, 8, 7), _SMALL_TILES
        ),
        "cogvideox": Case(
            autoencoders.cogvideox,
            (1, 4, 5, 9, 13),
            (1, 3, 9, 72, 96),
            (1, 4, 2, 4, 3),
            {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
            calls_per_tile=(2, 1),
        ),
        "hunyuan_video": Case(
            _hunyuan_video, (1, 4, 5, 5, 8), (1, 3, 13, 40, 64), (1, 4, 2, 4, 3), _SMALL_TILES | _FRAMES
        ),
        "hunyuan_image": Case(_hunyuan_image, (1, 4, 15, 19), None, (1, 4, 8, 7), switches={}),
        "hunyuan_refiner": Case(_hunyuan_refiner, (1, 4, 2, 9, 13), None, (1, 4, 2, 4, 3), _SMALL_TILES),
        "kvae": Case(_kvae, (1, 4, 15, 19), (1, 3, 30, 38), (1, 4, 7, 6), switches={}),
        "magvit": Case(
            _magvit, (1, 4, 3, 5, 8), (1, 3, 9, 40, 64), (1, 4, 2, 4, 3), _SMALL_TILES, calls_per_tile=(3, 3)
        ),
        "minimax": Case(
            _minimax,
            (1, 24, 5, 5, 7),
            (1, 3, 17, 80, 112),
            None,
            {"tile_sample_min_height": 48, "tile_sample_min_width": 48, "tile_sample_min_overlap_height": 16}
            | {"tile_sample_min_overlap_width": 16},
        ),
        "mochi": Case(_mochi, (1, 12, 2, 5, 8), (1, 3, 7, 40, 64), (1, 12, 2, 4, 3), _SMALL_TILES),
        "qwen_image21": Case(
            _qwen_image21, (1, 4, 1, 3, 5), (1, 4, 1, 64, 64), (1, 4, 1, 2, 2), _SMALL_TILES
        ),
        "oobleck": Case(
            autoencoders.oobleck,
            (1, 4, 37),
            (1, 2, 592),
            (1, 4, 8),
            switches={"tile_latent_min_length": 8, "tile_latent_overlap": 2}
            | {"tile_sample_min_length": 128, "tile_sample_overlap": 32},
        ),
        "tiny": Case(
            _tiny, (1, 4, 25, 29), (1, 3, 200, 232), None, switches={"tile_sample_min_size": 128}
            | {"tile_latent_min_size": 16}
        ),
        "vidtok": Case(
            _vidtok,
            (1, 4, 9, 6, 9),
            (1, 3, 17, 48, 72),
            None,
            {"tile_sample_min_height": 32, "tile_sample_min_width": 32},
            calls_per_tile=(3, 2),
        ),
        "allegro": Case(
            _allegro,
            (1, 4, 6, 10, 10),
            (1, 3, 24, 80, 80),
            None,
            switches={"kernel": (8, 32, 32), "stride": (4, 24, 24)},
        ),
    }
)  # fmt: skip

"""Tiny autoencoders and a vocoder: real diffusers classes, few channels, small reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def kl(levels: int = 3, channels: int = 4, shift: float | None = 0.1, **extra: Any) -> nn.Module:
    """Returns an `AutoencoderKL` for pictures.

    Args:
        levels: How many resolutions; the reduction is `2 ** (levels - 1)`.
        channels: Channels of the latents.
        shift: `shift_factor` of the class.
        **extra: More arguments of the class.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.7,
        shift_factor=shift,
        **extra,
    )


def flux2(levels: int = 3, channels: int = 4) -> nn.Module:
    """Returns an `AutoencoderKLFlux2`: its batch norm keeps statistics and a counter, an integer.

    Args:
        levels: How many resolutions; the reduction is `2 ** (levels - 1)`.
        channels: Channels of the latents.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.2, 4 * channels))
    vae.bn.running_var.copy_(torch.linspace(0.8, 1.2, 4 * channels))
    vae.bn.num_batches_tracked.fill_(7)
    return vae


def wan(channels: int = 4) -> nn.Module:
    """Returns an `AutoencoderKLWan`, reduction 8 in space and 4 in time.

    Args:
        channels: Channels of the latents.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_wan_figures(channels))


def qwen_image(channels: int = 4) -> nn.Module:
    """Returns an `AutoencoderKLQwenImage`: Wan's, for one frame.

    Args:
        channels: Channels of the latents.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(**_wan_figures(channels))


def _wan_figures(channels: int) -> dict[str, Any]:
    """Returns the figures shared by Wan's and Qwen-Image's autoencoders."""
    return {
        "base_dim": 4,
        "z_dim": channels,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1 * i for i in range(channels)],
        "latents_std": [1.0 + 0.1 * i for i in range(channels)],
    }


def ltx() -> nn.Module:
    """Returns an `AutoencoderKLLTXVideo`, reduction 8 in space and 2 in time."""
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
    )


def deep_compression() -> nn.Module:
    """Returns an `AutoencoderDC`, reduction 4, with linear attention in its last level."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.7,
    )


def ltx2() -> nn.Module:
    """Returns an `AutoencoderKLLTX2Video`, reduction 8 in space and 2 in time."""
    from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(1,),
    )


def ltx2_audio(mel_bins: int = 16) -> nn.Module:
    """Returns an `AutoencoderKLLTX2Audio`: spectrograms, reduction 4 in time and in pitch.

    Its statistics are saved buffers, one figure per channel and bin of the latents (`base_channels` of them).

    Args:
        mel_bins: Bins of the spectrogram.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderKLLTX2Audio

    channels = 2 * mel_bins // 4
    vae = AutoencoderKLLTX2Audio(
        base_channels=channels,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=2,
        resolution=32,
        mel_bins=mel_bins,
    )
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, channels))
    vae.latents_std.copy_(torch.linspace(0.8, 1.2, channels))
    return vae


def ltx2_vocoder(mel_bins: int = 16) -> nn.Module:
    """Returns an `LTX2Vocoder`: 240 samples of sound for each step of a spectrogram in two channels.

    Args:
        mel_bins: Bins of the spectrogram.

    Returns:
        The vocoder.
    """
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    return LTX2Vocoder(
        in_channels=2 * mel_bins,
        hidden_channels=16,
        upsample_kernel_sizes=[16, 15, 16],
        upsample_factors=[6, 5, 8],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )


def hunyuan_video15() -> nn.Module:
    """Returns an `AutoencoderKLHunyuanVideo15`, reduction 4 in space and in time."""
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def cogvideox() -> nn.Module:
    """Returns an `AutoencoderKLCogVideoX`, reduction 8 in space and 4 in time."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=48,
        sample_width=80,
    )


def oobleck(channels: int = 4) -> nn.Module:
    """Returns an `AutoencoderOobleck`: stereo sound, reduction 16.

    Args:
        channels: Channels of the latents.

    Returns:
        The autoencoder.
    """
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2, 4],
        channel_multiples=[1, 1, 2],
        decoder_channels=8,
        decoder_input_channels=channels,
        sampling_rate=1600,
    )

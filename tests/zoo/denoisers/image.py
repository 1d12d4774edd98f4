"""Denoisers of pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

from tests.zoo.denoisers.case import (
    BATCH,
    HEAD,
    MASKED,
    TEXT,
    Size,
    case,
    noise,
    picture,
    pooled,
    positions,
    text,
    times,
    tokens,
)

_JOINT = ("transformer_blocks", "single_transformer_blocks")


def _flux(heads: int) -> FluxTransformer2DModel:
    """Returns a Flux transformer that takes the guidance scale as input."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _flux_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents, text and the places of both."""
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "pooled_projections": pooled(),
        "timestep": times(),
        "guidance": torch.full((BATCH,), 3.5),
        "img_ids": positions(size),
        "txt_ids": torch.zeros(size.text, 3),
    }


def _sd3(heads: int) -> SD3Transformer2DModel:
    """Returns a Stable Diffusion 3.5 transformer: one dual block, and a last one that drops its text."""
    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        caption_projection_dim=HEAD * heads,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _sd3_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return {
        "hidden_states": picture(size, 4),
        "encoder_hidden_states": text(size),
        "pooled_projections": pooled(),
        "timestep": times(1000.0),
    }


def _qwen_image(heads: int) -> QwenImageTransformer2DModel:
    """Returns a Qwen-Image transformer."""
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents and text; as in the pipeline, a mask only where a prompt is padded."""
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "encoder_hidden_states_mask": size.mask() if size.ragged else None,
        "timestep": times(),
        "img_shapes": [[(1, *size.image)]] * BATCH,
    }


def _flux2(heads: int) -> Flux2Transformer2DModel:
    """Returns a Flux 2 transformer."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux2_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents, text and the places of both, for each row of the batch."""
    txt_ids = torch.zeros(size.text, 4)
    txt_ids[:, 3] = torch.arange(size.text)
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "timestep": times(),
        "guidance": torch.full((BATCH,), 3.5),
        "img_ids": positions(size, axes=4).expand(BATCH, -1, -1),
        "txt_ids": txt_ids.expand(BATCH, -1, -1),
    }


def _z_image(heads: int) -> ZImageTransformer2DModel:
    """Returns a Z-Image transformer."""
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=HEAD * heads,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    )


def _z_image_arguments(size: Size) -> dict[str, Any]:
    """Returns lists of latents, of shape (channels, 1, height, width), and of texts.

    Texts of different lengths are three times as long as elsewhere: their padded lengths are to differ too.
    """
    height, width = size.image
    longer = 3 if size.ragged else 1
    texts = noise("text", BATCH, longer * size.text, TEXT)
    return {
        "x": list(noise("image", BATCH, 4, 1, 2 * height, 2 * width)),
        "t": times(),
        "cap_feats": [row[: longer * length] for row, length in zip(texts, size.lengths, strict=True)],
    }


def _qwen_image21(heads: int) -> QwenImage21Transformer2DModel:
    """Returns a Qwen-Image 2.1 transformer."""
    return QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        context_in_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image21_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents and text; latents come in groups of four, so that "odd" has 36 and not 45."""
    height, width = size.image if size.tokens % 4 == 0 else (6, 6)
    groups = torch.arange(size.text + height * width // 4) >= size.text
    return {
        "hidden_states": noise("tokens", BATCH, height * width, 16),
        "encoder_hidden_states": text(size),
        "encoder_hidden_states_mask": size.mask() if size.ragged else None,
        "timestep": times(),
        "img_shapes": [[(1, height, width)]] * BATCH,
        "img_mask": groups.expand(BATCH, -1),
    }


CASES = (
    case("flux", _flux, _flux_arguments, _JOINT),
    case("sd3", _sd3, _sd3_arguments, ("transformer_blocks",), channels=0, note="the last block drops its text"),
    case("qwen_image", _qwen_image, _qwen_image_arguments, ("transformer_blocks",), MASKED),
    case("flux2", _flux2, _flux2_arguments, _JOINT, note="modulation shared by all blocks"),
    case(
        "z_image",
        _z_image,
        _z_image_arguments,
        ("noise_refiner", "context_refiner", "layers"),
        MASKED,
        streams=("x",),
        texts=("cap_feats",),
        channels=0,
        note="lists of tensors as inputs and output; each sequence padded to a multiple of 32",
    ),
    case(
        "qwen_image21",
        _qwen_image21,
        _qwen_image21_arguments,
        ("transformer_blocks",),
        MASKED,
        note="text blind to the picture; returns text and picture; picture tokens divisible by 4",
    ),
)

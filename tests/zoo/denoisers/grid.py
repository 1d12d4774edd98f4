"""Denoisers of pictures that cut the patches themselves."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
)

from tests.zoo.denoisers.case import BATCH, HEAD, MASKED, TEXT, Size, case, noise, picture, pooled, text, times

_BLOCKS = ("transformer_blocks",)


def _arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return {
        "hidden_states": picture(size, 4),
        "encoder_hidden_states": text(size),
        "timestep": times(1000.0),
    }


def _extent(size: Size) -> torch.Tensor:
    """Returns the height and width in pixels, for each row of the batch."""
    return 16.0 * torch.tensor([size.image] * BATCH)


def _cogview_traits(heads: int) -> dict[str, Any]:
    """Returns what the constructors of the CogView family share."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "text_embed_dim": TEXT,
        "time_embed_dim": 32,
        "condition_dim": 8,
    }


def _cogview3(heads: int) -> CogView3PlusTransformer2DModel:
    """Returns a CogView 3 Plus transformer: positions from a table, no rotation."""
    return CogView3PlusTransformer2DModel(**_cogview_traits(heads), pos_embed_max_size=16, sample_size=16)


def _cogview4(heads: int) -> CogView4Transformer2DModel:
    """Returns a CogView 4 transformer."""
    return CogView4Transformer2DModel(**_cogview_traits(heads), pos_embed_max_size=16, sample_size=16)


def _cogview3_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text and what the picture is to measure."""
    extent = _extent(size)
    return _arguments(size) | {"original_size": extent, "target_size": extent, "crop_coords": torch.zeros(BATCH, 2)}


def _cogview4_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of CogView 3 Plus, and a mask where a prompt is padded."""
    return _cogview3_arguments(size) | {"attention_mask": size.mask().long() if size.ragged else None}


def _glm(heads: int) -> GlmImageTransformer2DModel:
    """Returns a GLM-Image transformer."""
    return GlmImageTransformer2DModel(**_cogview_traits(heads), prior_vq_quantizer_codebook_size=12)


def _glm_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text, a token of the prior for each of the picture's, and a mask where a prompt is padded."""
    ids = torch.arange(BATCH * size.tokens).view(BATCH, -1) * 5 % 12
    return _arguments(size) | {
        "prior_token_id": ids,
        "prior_token_drop": torch.zeros_like(ids, dtype=torch.bool),
        "target_size": _extent(size),
        "crop_coords": torch.zeros(BATCH, 2),
        "attention_mask": size.mask().long() if size.ragged else None,
    }


def _lumina2(heads: int) -> Lumina2Transformer2DModel:
    """Returns a Lumina 2 transformer with half as many heads for keys and values, or a single one."""
    return Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=HEAD * heads,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=heads,
        num_kv_heads=1 if heads % 2 else heads // 2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 16, 16),
        cap_feat_dim=TEXT,
    )


def _lumina2_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return _arguments(size) | {"timestep": times(), "encoder_attention_mask": size.mask()}


def _aura_flow(heads: int) -> AuraFlowTransformer2DModel:
    """Returns an AuraFlow transformer: eight tokens of its own before the text, positions from a table."""
    return AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        caption_projection_dim=HEAD * heads,
        pos_embed_max_size=256,
    )


def _aura_flow_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return _arguments(size) | {"timestep": times()}


def _pixart(heads: int) -> PixArtTransformer2DModel:
    """Returns a PixArt Sigma transformer; half of its output channels are a variance."""
    return PixArtTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        cross_attention_dim=HEAD * heads,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )


def _pixart_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return _arguments(size) | {"encoder_attention_mask": size.mask().long()}


def _hidream(heads: int) -> HiDreamImageTransformer2DModel:
    """Returns a HiDream-I1 transformer; pictures that are not square are padded to 99 tokens."""
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        caption_channels=[TEXT, 24],
        text_emb_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(18, 22),
        llama_layers=[0, 1, 2, 2, 1],
    )


def _hidream_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, a text of one layer and one of several layers."""
    return {
        "hidden_states": picture(size, 4),
        "timesteps": times(1000.0),
        "encoder_hidden_states_t5": text(size),
        "encoder_hidden_states_llama3": noise("layers", 3, BATCH, size.text, 24),
        "pooled_embeds": pooled(),
    }


def _hunyuan_image(heads: int) -> HunyuanImageTransformer2DModel:
    """Returns a HunyuanImage 2.1 transformer that reads two texts."""
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        rope_axes_dim=(8, 8),
    )


def _hunyuan_image_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and two texts with masks."""
    return _arguments(size) | {
        "hidden_states": picture(size, 4, patch=1),
        "encoder_attention_mask": size.mask().long(),
        "encoder_hidden_states_2": noise("words", BATCH, max(size.words), TEXT),
        "encoder_attention_mask_2": size.word_mask().long(),
    }


CASES = (
    case(
        "cogview4",
        _cogview4,
        _cogview4_arguments,
        _BLOCKS,
        MASKED,
        channels=0,
        leaks=True,
        note="the mask becomes floats, which attention adds as a bias",
    ),
    case(
        "lumina2",
        _lumina2,
        _lumina2_arguments,
        ("context_refiner", "noise_refiner", "layers"),
        MASKED,
        channels=0,
        note="fewer heads for keys and values; the text in one sequence with the picture",
    ),
    case(
        "aura_flow",
        _aura_flow,
        _aura_flow_arguments,
        ("joint_transformer_blocks", "single_transformer_blocks"),
        gain=1.5,
        channels=0,
        note="eight learnt tokens before the text",
    ),
    case("pixart", _pixart, _pixart_arguments, _BLOCKS, MASKED, channels=0, note="text by cross-attention"),
    case(
        "hidream",
        _hidream,
        _hidream_arguments,
        ("double_stream_blocks", "single_stream_blocks"),
        texts=("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        channels=0,
        note="experts chosen per token; text appended in each block; odd pictures padded",
    ),
    case("glm_image", _glm, _glm_arguments, _BLOCKS, MASKED, channels=0, leaks=True, note="mask as in cogview4"),
    case("cogview3_plus", _cogview3, _cogview3_arguments, _BLOCKS, channels=0, note="positions from a table"),
    case(
        "hunyuan_image",
        _hunyuan_image,
        _hunyuan_image_arguments,
        ("transformer_blocks", "single_transformer_blocks"),
        MASKED,
        texts=("encoder_hidden_states", "encoder_hidden_states_2"),
        channels=0,
        note="two texts in one stream, of which the padding is moved to the end",
    ),
)

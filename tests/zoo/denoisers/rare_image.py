"""Denoisers of pictures that few pipelines use."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    ErnieImageTransformer2DModel,
    HunyuanDiT2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    PRXTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from tests.zoo.denoisers.case import (
    BATCH,
    HEAD,
    MASKED,
    TEXT,
    Size,
    case,
    noise,
    picture,
    positions,
    text,
    times,
    tokens,
)

_BLOCKS = ("transformer_blocks",)


def _krea2(heads: int) -> Krea2Transformer2DModel:
    """Returns a Krea 2 transformer with half as many heads for keys and values, or a single one."""
    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else heads // 2,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=TEXT,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _krea2_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents, two layers of text features of shape (batch, text, layers, width), and the places."""
    places = torch.cat([torch.zeros(size.text, 3), positions(size)])
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": noise("text", BATCH, size.text, 2, TEXT),
        "timestep": times(),
        "position_ids": places,
        "encoder_attention_mask": size.mask(),
    }


def _prx(heads: int) -> PRXTransformer2DModel:
    """Returns a PRX transformer: the picture asks, text and picture answer."""
    return PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=TEXT,
        hidden_size=HEAD * heads,
        mlp_ratio=2.0,
        num_heads=heads,
        depth=3,
        axes_dim=[8, 8],
    )


def _prx_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return {
        "hidden_states": picture(size, 4),
        "timestep": times(),
        "encoder_hidden_states": text(size),
        "attention_mask": size.mask(),
    }


def _ernie(heads: int) -> ErnieImageTransformer2DModel:
    """Returns an ERNIE-Image transformer: tokens before the batch."""
    return ErnieImageTransformer2DModel(
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        num_layers=3,
        ffn_hidden_size=64,
        in_channels=8,
        out_channels=8,
        text_in_dim=TEXT,
        rope_axes_dim=(4, 6, 6),
    )


def _ernie_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text and its lengths."""
    return {
        "hidden_states": picture(size, 8, patch=1),
        "timestep": times(1000.0),
        "text_bth": text(size),
        "text_lens": torch.tensor(size.lengths),
    }


def _ideogram4(heads: int) -> Ideogram4Transformer2DModel:
    """Returns an Ideogram 4 transformer."""
    return Ideogram4Transformer2DModel(
        in_channels=8,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=TEXT,
        mrope_section=(4, 2, 2),
    )


def _ideogram4_arguments(size: Size) -> dict[str, Any]:
    """Returns noise, text and places of one sequence, and what each token is.

    The picture comes first here, so that its first token is the first of all. Padding is a segment of its own.
    """
    shape = (BATCH, size.tokens + size.text)
    kinds, segments = torch.full(shape, 3), torch.ones(shape, dtype=torch.long)
    kinds[:, : size.tokens] = 2
    padding = ~size.mask()
    kinds[:, size.tokens :][padding] = 0
    segments[:, size.tokens :][padding] = -1
    places = torch.cat([positions(size).long() + size.text, torch.arange(size.text)[:, None].repeat(1, 3)])
    return {
        "hidden_states": torch.cat([tokens(size, 8), torch.zeros(BATCH, size.text, 8)], 1),
        "timestep": times(),
        "encoder_hidden_states": torch.cat([torch.zeros(BATCH, size.tokens, TEXT), text(size)], 1),
        "position_ids": places.expand(BATCH, -1, -1),
        "segment_ids": segments,
        "indicator": kinds,
    }


def _dit(heads: int) -> DiTTransformer2DModel:
    """Returns a DiT transformer: no text, but a class of pictures."""
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=10,
    )


def _dit_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of a square, and classes."""
    side = 2 * size.image[0]
    return {
        "hidden_states": noise("image", BATCH, 4, side, side),
        "timestep": times(1000.0).long(),
        "class_labels": torch.tensor([3, 7]),
    }


def _hunyuan_dit(heads: int) -> HunyuanDiT2DModel:
    """Returns a Hunyuan-DiT transformer, whose last block reads the first one's tokens as well."""
    return HunyuanDiT2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=HEAD * heads,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=16,
        pooled_projection_dim=TEXT,
        text_len=16,
        text_len_t5=8,
        use_style_cond_and_image_meta_size=False,
    )


def _hunyuan_dit_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, two texts with masks, the rotation, and what a ControlNet adds."""
    height, width = size.image
    window = ((0, 0), size.image)
    return {
        "hidden_states": picture(size, 4),
        "timestep": times(1000.0),
        "encoder_hidden_states": noise("text", BATCH, 16, TEXT),
        "text_embedding_mask": torch.ones(BATCH, 16),
        "encoder_hidden_states_t5": noise("words", BATCH, 8, 16),
        "text_embedding_mask_t5": torch.ones(BATCH, 8),
        "image_rotary_emb": get_2d_rotary_pos_embed(HEAD, window, (height, width), output_type="pt"),
        "controlnet_block_samples": [0.5 * noise("residual", BATCH, size.tokens, 1)],
    }


CASES = (
    case(
        "krea2",
        _krea2,
        _krea2_arguments,
        _BLOCKS,
        MASKED,
        note="fewer heads for keys and values; a text of several layers, in one sequence with the picture",
    ),
    case("prx", _prx, _prx_arguments, ("blocks",), MASKED, channels=0, note="text as keys alone"),
    case(
        "ernie_image",
        _ernie,
        _ernie_arguments,
        ("layers",),
        MASKED,
        texts=("text_bth",),
        channels=0,
        note="tokens before the batch; modulation for each token",
    ),
    case(
        "ideogram4",
        _ideogram4,
        _ideogram4_arguments,
        ("layers",),
        MASKED,
        texts=(),
        note="a mask of tokens by tokens; the text shares a sequence with the picture",
    ),
    case("dit", _dit, _dit_arguments, _BLOCKS, ("even", "odd"), texts=(), channels=0, note="squares; no text"),
    case(
        "hunyuan_dit",
        _hunyuan_dit,
        _hunyuan_dit_arguments,
        ("blocks",),
        ("even", "odd"),
        texts=("encoder_hidden_states", "encoder_hidden_states_t5"),
        channels=0,
        note="the first block's tokens go to the last one; texts of one length",
    ),
)

"""Denoisers that are kin of others, and those that split their tokens in a way of their own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    HeliosTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    MiniMaxMusic3Transformer1DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SkyReelsV2Transformer3DModel,
)

from tests.zoo.denoisers.case import (
    BATCH,
    HEAD,
    MASKED,
    TEXT,
    Size,
    case,
    noise,
    pooled,
    text,
    times,
    tokens,
    video,
)

_BLOCKS = ("transformer_blocks",)


def _arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return {
        "hidden_states": video(size, 4),
        "timestep": times(1000.0),
        "encoder_hidden_states": text(size),
    }


def _mochi(heads: int) -> MochiTransformer3DModel:
    """Returns a Mochi transformer, whose last block drops its text."""
    return MochiTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=3,
        pooled_projection_dim=16 * heads,
        text_embed_dim=TEXT,
        time_embed_dim=32,
        max_sequence_length=16,
    )


def _mochi_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return _arguments(size) | {"encoder_attention_mask": size.mask()}


def _helios(heads: int) -> HeliosTransformer3DModel:
    """Returns a Helios transformer, whose text is read by new tokens alone."""
    return HeliosTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_dim=(4, 6, 6),
        is_amplify_history=True,
    )


def _helios_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text and three histories, each coarser than the one before."""
    frames, height, width = size.video
    counts = {"short": 1, "mid": 2, "long": 4}
    rows = {f"latents_history_{name}": noise(name, BATCH, 4, n, 2 * height, 2 * width) for name, n in counts.items()}
    places = {f"indices_latents_history_{name}": torch.arange(n).expand(BATCH, -1) for name, n in counts.items()}
    return _arguments(size) | rows | places | {"indices_hidden_states": torch.arange(7, 7 + frames).expand(BATCH, -1)}


def _qwen_clean(heads: int) -> QwenImageTransformer2DModel:
    """Returns a Qwen-Image transformer that takes the tokens of other pictures for clean."""
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=True,
    )


def _qwen_clean_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents of a picture and of one to start from, and text."""
    height, width = size.image
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "encoder_hidden_states_mask": size.mask() if size.ragged else None,
        "timestep": times(),
        "img_shapes": [[(1, 2, width), (1, height - 2, width)]] * BATCH,
    }


def _hunyuan_replace(heads: int) -> HunyuanVideoTransformer3DModel:
    """Returns a HunyuanVideo transformer whose first frame is given."""
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        pooled_projection_dim=TEXT,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=False,
        image_condition_type="token_replace",
    )


def _hunyuan_replace_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return _mochi_arguments(size) | {"pooled_projections": pooled()}


def _skyreels_causal(heads: int) -> SkyReelsV2Transformer3DModel:
    """Returns a SkyReels V2 transformer whose frames see those before them."""
    return SkyReelsV2Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
        num_frame_per_block=1,
    )


def _minimax_music3(heads: int) -> MiniMaxMusic3Transformer1DModel:
    """Returns a MiniMax Music 3 transformer, whose time is a token before those of the sound."""
    return MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=TEXT,
        num_layers=3,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=32,
    )


def _minimax_music3_arguments(size: Size) -> dict[str, Any]:
    """Returns sound, and what it is to sound like frame by frame."""
    return {
        "hidden_states": noise("sound", BATCH, 8, size.tokens),
        "timestep": times(),
        "encoder_hidden_states": noise("text", BATCH, size.tokens, TEXT),
    }


CASES = (
    case("minimax_music3", _minimax_music3, _minimax_music3_arguments, _BLOCKS, note="the time is a token"),
    case("mochi", _mochi, _mochi_arguments, _BLOCKS, MASKED, channels=0, note="rows of the batch one by one"),
    case(
        "helios", _helios, _helios_arguments, ("blocks",), gain=1.7, channels=0, note="three histories before the video"
    ),
    case("qwen_image_clean", _qwen_clean, _qwen_clean_arguments, _BLOCKS, MASKED, note="two kinds of modulation"),
    case(
        "hunyuan_video_replace",
        _hunyuan_replace,
        _hunyuan_replace_arguments,
        ("transformer_blocks", "single_transformer_blocks"),
        MASKED,
        channels=0,
        note="modulation of its own for the first frame, by the number of its tokens",
    ),
    case(
        "skyreels_v2_causal", _skyreels_causal, _arguments, ("blocks",), channels=0, note="a mask of tokens by tokens"
    ),
)

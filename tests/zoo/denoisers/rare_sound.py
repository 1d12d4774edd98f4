"""Denoisers of sound, and of videos with sound, that few pipelines use."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    Kandinsky6Transformer3DModel,
    LongCatAudioDiTTransformer,
    MiniMaxH3Transformer3DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from tests.zoo.denoisers.case import BATCH, HEAD, MASKED, TEXT, Size, case, noise, pooled, text, times, tokens, video

_BLOCKS = ("transformer_blocks",)


def _sound(size: Size, channels: int) -> torch.Tensor:
    """Returns latents of shape (batch, channels, tokens)."""
    return noise("sound", BATCH, channels, size.tokens)


def _stable_audio(heads: int) -> StableAudioDiTModel:
    """Returns a Stable Audio transformer with half as many heads for the text's keys, or a single one."""
    return StableAudioDiTModel(
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        num_key_value_attention_heads=1 if heads % 2 else heads // 2,
        cross_attention_dim=HEAD * (1 if heads % 2 else heads // 2),
        time_proj_dim=32,
        global_states_input_dim=TEXT,
        cross_attention_input_dim=TEXT,
    )


def _stable_audio_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text, how long the sound lasts, and the rotation of each token; the first is that length."""
    rotation = get_1d_rotary_pos_embed(HEAD // 2, size.tokens + 1, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": _sound(size, 8),
        "timestep": times(),
        "encoder_hidden_states": text(size),
        "global_hidden_states": pooled()[:, None],
        "rotary_embedding": rotation,
    }


def _stable_audio_padded_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of Stable Audio and which tokens of the sound count: in the second row, not the last."""
    lengths = torch.tensor([[size.tokens], [size.tokens - 5]])
    return _stable_audio_arguments(size) | {"attention_mask": torch.arange(size.tokens) < lengths}


def _stable_audio3(heads: int) -> StableAudio3DiTModel:
    """Returns a Stable Audio 3 transformer: each attention is the difference of two."""
    return StableAudio3DiTModel(
        io_channels=8,
        embed_dim=HEAD * heads,
        depth=3,
        num_heads=heads,
        cond_token_dim=TEXT,
        global_cond_dim=TEXT,
        local_add_cond_dim=9,
        timestep_features_dim=32,
        ff_mult=2.0,
        num_memory_tokens=5,
    )


def _stable_audio3_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text with a mask and how long the sound lasts."""
    return {
        "hidden_states": _sound(size, 8),
        "timestep": times(),
        "encoder_hidden_states": text(size),
        "global_hidden_states": pooled(),
        "encoder_attention_mask": size.mask(),
    }


def _longcat_audio(heads: int) -> LongCatAudioDiTTransformer:
    """Returns a LongCat-AudioDiT transformer."""
    return LongCatAudioDiTTransformer(
        dit_dim=HEAD * heads, dit_depth=3, dit_heads=heads, dit_text_dim=TEXT, latent_dim=8, ff_mult=2.0
    )


def _longcat_audio_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with masks: the second sound is five tokens shorter, padded at its beginning."""
    starts = torch.tensor([[0], [5]])
    return {
        "hidden_states": tokens(size, 8),
        "encoder_hidden_states": text(size),
        "encoder_attention_mask": size.mask(),
        "timestep": times(),
        "attention_mask": torch.arange(size.tokens) >= starts,
        "latent_cond": noise("voice", BATCH, size.tokens, 8),
    }


def _minimax(heads: int) -> MiniMaxH3Transformer3DModel:
    """Returns a MiniMax H3 transformer: text, video and sound in one sequence."""
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=2,
        audio_in_channels=8,
        text_dim=TEXT,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=32,
        rope_freq_dim=2,
    )


def _minimax_arguments(size: Size) -> dict[str, Any]:
    """Returns patches of video, sound and text, where each lies in the sequence, and two noise levels."""
    sound = 8 + size.tokens % 2
    kinds = torch.cat([torch.full((size.text,), 2), torch.zeros(size.tokens), torch.ones(sound)]).long()
    total = len(kinds)
    places = torch.arange(total)
    return {
        "hidden_states": tokens(size, 8),
        "audio_hidden_states": noise("sound", BATCH, sound, 8),
        "encoder_hidden_states": text(size),
        "timestep": torch.tensor([0.0, 700.0]),
        "timestep_indices": (kinds != 2).long(),
        "token_tags": kinds,
        "position_ids": places[:, None] // torch.tensor([16, 4, 1]),
        "video_indices": places[kinds == 0],
        "audio_indices": places[kinds == 1],
        "text_indices": places[kinds == 2],
    }


def _kandinsky6(heads: int) -> Kandinsky6Transformer3DModel:
    """Returns a Kandinsky 6 transformer."""
    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=TEXT,
        time_dim=32,
        model_dim=HEAD * heads,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=8,
        out_audio_dim=8,
        ff_dim_a=32,
        ca_rope=True,
    )


def _kandinsky6_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of shape (batch, frames, height, width, channels), sound, and text with a mask."""
    return {
        "hidden_states": video(size, 4).movedim(1, -1).contiguous(),
        "encoder_hidden_states": text(size),
        "pooled_projections": pooled(),
        "timestep": times(1000.0),
        "audio_hidden_states": noise("sound", BATCH, 8 + size.tokens % 2, 8),
        "encoder_attention_mask": size.mask(),
    }


CASES = (
    case(
        "stable_audio",
        _stable_audio,
        _stable_audio_arguments,
        _BLOCKS,
        channels=0,
        note="fewer heads for the text; is given the rotation",
    ),
    case(
        "stable_audio_padded",
        _stable_audio,
        _stable_audio_padded_arguments,
        _BLOCKS,
        channels=0,
        note="a mask of tokens, repeated for each head",
    ),
    case(
        "stable_audio3",
        _stable_audio3,
        _stable_audio3_arguments,
        _BLOCKS,
        ("even", "odd", "masked", "masked_odd"),  # the difference of two looks at a single word is nothing
        channels=0,
        note="two attentions in one module; learnt tokens before the sound",
    ),
    case(
        "longcat_audio",
        _longcat_audio,
        _longcat_audio_arguments,
        ("blocks",),
        MASKED,
        note="sounds of two lengths: the mask drops keys, and what attention gives",
    ),
    case(
        "minimax_h3",
        _minimax,
        _minimax_arguments,
        _BLOCKS,
        streams=("hidden_states", "audio_hidden_states"),
        note="text, video and sound in one sequence; modulation by the kind of token",
    ),
    case(
        "kandinsky6",
        _kandinsky6,
        _kandinsky6_arguments,
        ("visual_transformer_blocks",),
        MASKED,
        streams=("hidden_states", "audio_hidden_states"),
        note="video and sound that attend to each other; a text for each",
    ),
)

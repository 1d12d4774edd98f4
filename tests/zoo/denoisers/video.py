"""Denoisers of videos, with and without sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from tests.zoo.denoisers.case import BATCH, HEAD, MASKED, TEXT, Size, case, noise, pooled, text, times, tokens, video

_BLOCKS = ("blocks",)
_TRANSFORMER_BLOCKS = ("transformer_blocks",)


def _wan(heads: int, **traits: Any) -> WanTransformer3DModel:
    """Returns a Wan transformer; its query and key norms run across all heads."""
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        **{"in_channels": 4, **traits},
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
    )


def _wan_i2v(heads: int) -> WanTransformer3DModel:
    """Returns a Wan 2.1 transformer that starts from a picture: more channels, and cross-attention to the picture."""
    return _wan(heads, in_channels=9, image_dim=24, added_kv_proj_dim=HEAD * heads)


def _wan_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return {
        "hidden_states": video(size, 4),
        "timestep": times(1000.0),
        "encoder_hidden_states": text(size),
    }


def _wan_i2v_arguments(size: Size) -> dict[str, Any]:
    """Returns latents beside a picture's, text, and the picture as seen by an image encoder.

    The class takes the last 512 tokens of picture and text for the text.
    """
    return _wan_arguments(size) | {
        "hidden_states": video(size, 9),
        "encoder_hidden_states": noise("text", BATCH, 512, TEXT),
        "encoder_hidden_states_image": noise("picture", BATCH, size.text, 24),
    }


def _wan_ti2v_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text, and a noise level for each token: the first frame is clean."""
    clean = size.tokens // size.video[0]
    timestep = times(1000.0)[:, None].repeat(1, size.tokens)
    timestep[:, :clean] = 0.0
    return _wan_arguments(size) | {"timestep": timestep}


def _skyreels(heads: int) -> SkyReelsV2Transformer3DModel:
    """Returns a SkyReels V2 transformer."""
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
    )


def _skyreels_forcing_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text, and a noise level for each frame."""
    timestep = times(1000.0)[:, None] * torch.linspace(0.2, 0.9, size.video[0])
    return _wan_arguments(size) | {"timestep": timestep, "enable_diffusion_forcing": True}


def _kandinsky5(heads: int) -> Kandinsky5Transformer3DModel:
    """Returns a Kandinsky 5 transformer."""
    return Kandinsky5Transformer3DModel(
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
    )


def _kandinsky5_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of shape (batch, frames, height, width, channels), text and the places of both."""
    return {
        "hidden_states": video(size, 4).movedim(1, -1).contiguous(),
        "encoder_hidden_states": text(size),
        "timestep": times(1000.0),
        "pooled_projections": pooled(),
        "visual_rope_pos": [torch.arange(extent) for extent in size.video],
        "text_rope_pos": torch.arange(size.text),
    }


def _cogvideox(heads: int, rotary: bool = True) -> CogVideoXTransformer3DModel:
    """Returns a CogVideoX transformer: of the 5B kind, which is told the rotation, or of the 2B kind."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=3,
        sample_width=16,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=rotary,
    )


def _cogvideox_table(heads: int) -> CogVideoXTransformer3DModel:
    """Returns a CogVideoX transformer with a table of positions for text and video, so a text of one length."""
    return _cogvideox(heads, rotary=False)


def _cogvideox_table_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of shape (batch, frames, channels, height, width) and text."""
    return _wan_arguments(size) | {"hidden_states": video(size, 4).transpose(1, 2).contiguous()}


def _cogvideox_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text and the rotation of each token of the video: cosines and sines of (tokens, head)."""
    frames, height, width = size.video
    window = ((0, 0), (height, width))
    rotation = get_3d_rotary_pos_embed(HEAD, window, (height, width), frames)
    return _cogvideox_table_arguments(size) | {"image_rotary_emb": rotation}


def _hunyuan(heads: int) -> HunyuanVideoTransformer3DModel:
    """Returns a HunyuanVideo transformer."""
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
    )


def _hunyuan_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text with a mask."""
    return _wan_arguments(size) | {
        "encoder_attention_mask": size.mask(),
        "pooled_projections": pooled(),
        "guidance": torch.full((BATCH,), 6000.0),
    }


def _hunyuan15(heads: int) -> HunyuanVideo15Transformer3DModel:
    """Returns a HunyuanVideo 1.5 transformer."""
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=3,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan15_arguments(size: Size) -> dict[str, Any]:
    """Returns latents and two texts with masks; the picture is absent, its tokens zero."""
    return _wan_arguments(size) | {
        "hidden_states": video(size, 9, patch=1),
        "encoder_attention_mask": size.mask().long(),
        "encoder_hidden_states_2": noise("words", BATCH, max(size.words), TEXT),
        "encoder_attention_mask_2": size.word_mask().long(),
        "image_embeds": torch.zeros(BATCH, 6, 24),
    }


def _hunyuan15_i2v_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, two texts with masks and a picture's embeddings."""
    return _hunyuan15_arguments(size) | {"image_embeds": noise("picture", BATCH, 8, 24)}


def _ltx(heads: int) -> LTXVideoTransformer3DModel:
    """Returns an LTX-Video transformer."""
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        cross_attention_dim=HEAD * heads,
        num_layers=3,
        caption_channels=TEXT,
    )


def _ltx_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents and text with a mask."""
    frames, height, width = size.video
    return {
        "hidden_states": tokens(size, 8),
        "encoder_hidden_states": text(size),
        "timestep": times(1000.0),
        "encoder_attention_mask": size.mask().long(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _ltx_i2v_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of LTX with a noise level for each token: the first frame is clean."""
    return _ltx_arguments(size) | {"timestep": _wan_ti2v_arguments(size)["timestep"]}


def _ltx2(heads: int, **traits: Any) -> LTX2VideoTransformer3DModel:
    """Returns an LTX 2 transformer of video and sound."""
    return LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        cross_attention_dim=HEAD * heads,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=heads,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=8 * heads,
        num_layers=3,
        caption_channels=TEXT,
        **traits,
    )


def _ltx2_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents of video and sound, a text with a mask for each, and a noise level for each token."""
    sound = 8 + size.tokens % 2
    return _ltx_arguments(size) | {
        "audio_hidden_states": noise("sound", BATCH, sound, 8),
        "audio_encoder_hidden_states": noise("sound text", BATCH, size.text, TEXT),
        "timestep": times(1000.0)[:, None].expand(-1, size.tokens),
        "audio_timestep": times(1000.0),
        "audio_encoder_attention_mask": size.mask().long(),
        "audio_num_frames": sound,
    }


def _ltx23(heads: int) -> LTX2VideoTransformer3DModel:
    """Returns an LTX 2.3 transformer: gates on the heads, modulated text, and rotation by halves."""
    return _ltx2(
        heads,
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        perturbed_attn=True,
        rope_type="split",
    )


def _ltx23_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of LTX 2 with the noise level of the whole."""
    return _ltx2_arguments(size) | {"sigma": times(1000.0), "use_cross_timestep": True}


_LTX2_STREAMS = ("hidden_states", "audio_hidden_states")
_LTX2_TEXTS = ("encoder_hidden_states", "audio_encoder_hidden_states")

CASES = (
    case("wan", _wan, _wan_arguments, _BLOCKS, channels=0, note="norms across heads; text by cross-attention"),
    case(
        "wan_i2v",
        _wan_i2v,
        _wan_i2v_arguments,
        _BLOCKS,
        ("even", "odd"),
        texts=("encoder_hidden_states", "encoder_hidden_states_image"),
        channels=0,
        note="a picture in more channels and by cross-attention of its own; always 512 text tokens",
    ),
    case("wan_ti2v", _wan, _wan_ti2v_arguments, _BLOCKS, channels=0, note="a noise level for each token"),
    case(
        "hunyuan_video15",
        _hunyuan15,
        _hunyuan15_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        texts=("encoder_hidden_states", "encoder_hidden_states_2"),
        channels=0,
        note="two texts and a picture in one stream, of which the padding is moved to the end",
    ),
    case(
        "hunyuan_video15_i2v",
        _hunyuan15,
        _hunyuan15_i2v_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        texts=("encoder_hidden_states", "encoder_hidden_states_2"),
        channels=0,
        note="as hunyuan_video15, with a picture that counts",
    ),
    case(
        "ltx2",
        _ltx2,
        _ltx2_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        streams=_LTX2_STREAMS,
        texts=_LTX2_TEXTS,
        note="two streams with sequences and heads of their own that attend to each other; two outputs",
    ),
    case(
        "ltx23",
        _ltx23,
        _ltx23_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        streams=_LTX2_STREAMS,
        texts=_LTX2_TEXTS,
        note="as ltx2, with a gate on each head and rotations of their own for each head",
    ),
    case("ltx", _ltx, _ltx_arguments, _TRANSFORMER_BLOCKS, MASKED, note="norms across heads; a mask as a bias"),
    case("ltx_i2v", _ltx, _ltx_i2v_arguments, _TRANSFORMER_BLOCKS, MASKED, note="a noise level for each token"),
    case("cogvideox", _cogvideox, _cogvideox_arguments, _TRANSFORMER_BLOCKS, channels=1, note="is given the rotation"),
    case(
        "cogvideox_table",
        _cogvideox_table,
        _cogvideox_table_arguments,
        _TRANSFORMER_BLOCKS,
        ("even",),
        channels=1,
        note="positions from a table that fixes the length of the text",
    ),
    case("skyreels_v2", _skyreels, _wan_arguments, _BLOCKS, channels=0, note="as wan"),
    case(
        "skyreels_v2_forcing",
        _skyreels,
        _skyreels_forcing_arguments,
        _BLOCKS,
        channels=0,
        note="a noise level for each frame",
    ),
    case(
        "kandinsky5",
        _kandinsky5,
        _kandinsky5_arguments,
        ("text_transformer_blocks", "visual_transformer_blocks"),
        note="channels last; returns a bare tensor where others return a tuple",
    ),
    case(
        "hunyuan_video",
        _hunyuan,
        _hunyuan_arguments,
        ("transformer_blocks", "single_transformer_blocks"),
        MASKED,
        channels=0,
        note="a refiner of the text before the stacks",
    ),
)

"""Denoisers of videos that few pipelines use."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    LatteTransformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro

from tests.zoo.denoisers.case import BATCH, HEAD, MASKED, TEXT, Size, case, noise, pooled, text, times, video

_BLOCKS = ("blocks",)
_TRANSFORMER_BLOCKS = ("transformer_blocks",)
_FRAMES = 3
"""Frames of a video for a class that is built for one number of them."""


def _arguments(size: Size) -> dict[str, Any]:
    """Returns latents and text."""
    return {
        "hidden_states": video(size, 4),
        "timestep": times(1000.0),
        "encoder_hidden_states": text(size),
    }


def _wan_traits(heads: int) -> dict[str, Any]:
    """Returns what the constructors of Wan's relatives share."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": HEAD,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    }


def _chronoedit(heads: int) -> ChronoEditTransformer3DModel:
    """Returns a ChronoEdit transformer."""
    return ChronoEditTransformer3DModel(**_wan_traits(heads))


def _vace(heads: int) -> WanVACETransformer3DModel:
    """Returns a Wan VACE transformer with hints behind the first and the last block."""
    return WanVACETransformer3DModel(**_wan_traits(heads), vace_layers=[0, 2], vace_in_channels=6)


def _vace_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text and the latents of a control video."""
    frames, height, width = size.video
    control = noise("control", BATCH, 6, frames, 2 * height, 2 * width)
    return _arguments(size) | {
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def _animate(heads: int) -> WanAnimateTransformer3DModel:
    """Returns a Wan Animate transformer: a face is looked at behind every second block, frame by frame."""
    traits = _wan_traits(heads) | {"in_channels": 12, "num_layers": 4}
    return WanAnimateTransformer3DModel(
        **traits,
        latent_channels=4,
        image_dim=None,
        motion_encoder_channel_sizes={"8": 8, "4": 8},
        motion_encoder_size=8,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _animate_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text, the latents of a pose for all frames but the first, and pictures of a face."""
    frames, height, width = size.video
    return _arguments(size) | {
        "hidden_states": video(size, 12),
        "pose_hidden_states": noise("pose", BATCH, 4, frames - 1, 2 * height, 2 * width),
        "face_pixel_values": noise("face", BATCH, 3, 4 * (frames - 1), 8, 8),
    }


def _anyflow(heads: int) -> AnyFlowTransformer3DModel:
    """Returns an AnyFlow transformer."""
    return AnyFlowTransformer3DModel(**_wan_traits(heads))


def _anyflow_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of shape (batch, frames, channels, height, width), text, and two times for each frame."""
    timestep = times(1000.0)[:, None].repeat(1, size.video[0])
    return _arguments(size) | {
        "hidden_states": video(size, 4).transpose(1, 2).contiguous(),
        "timestep": timestep,
        "r_timestep": 0.5 * timestep,
    }


def _allegro(heads: int) -> AllegroTransformer3DModel:
    """Returns an Allegro transformer; heads are a multiple of six wide."""
    return AllegroTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=12 * heads,
        sample_height=8,
        sample_width=16,
        sample_frames=4,
        caption_channels=TEXT,
    )


def _allegro_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text with a mask, and the rotation: tables, and the place of each token in them."""
    frames, height, width = size.video
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (height, width)), grid_size=(height, width), temporal_size=frames
    )
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None].contiguous()
    return _arguments(size) | {
        "encoder_attention_mask": size.mask().long(),
        "image_rotary_emb": (tuple(tables), tuple(places)),
    }


def _allegro_padded_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of Allegro and which pixels of the latents count: in the second row, half of a height."""
    frames, height, width = size.video
    mask = torch.ones(BATCH, frames, 2 * height, 2 * width)
    mask[1, :, height:] = 0.0
    return _allegro_arguments(size) | {"attention_mask": mask}


def _consisid(heads: int) -> ConsisIDTransformer3DModel:
    """Returns a ConsisID transformer that looks at a face behind every second block."""
    return ConsisIDTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=4,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=12,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=int(HEAD * heads / 3 * 2),
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )


def _consisid_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of shape (batch, frames, channels, height, width), text, the rotation and two views of a face."""
    frames, height, width = size.video
    return _arguments(size) | {
        "hidden_states": video(size, 4).transpose(1, 2).contiguous(),
        "image_rotary_emb": get_3d_rotary_pos_embed(HEAD, ((0, 0), (height, width)), (height, width), frames),
        "id_cond": noise("face", BATCH, 12),
        "id_vit_hidden": [noise(f"view {scale}", BATCH, 5, 12) for scale in range(2)],
    }


def _cosmos(heads: int) -> CosmosTransformer3DModel:
    """Returns a Cosmos transformer with positions that are learnt, added in each block."""
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        adaln_lora_dim=8,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        controlnet_block_every_n=2,
    )


def _cosmos_frames_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of Cosmos with a noise level for each frame, and what a ControlNet adds."""
    timestep = times(1000.0)[:, None] * torch.linspace(0.2, 0.9, size.video[0])
    residuals = [0.5 * noise(f"residual {block}", BATCH, size.tokens, 1) for block in range(2)]
    return _arguments(size) | {
        "timestep": timestep[:, None, :, None, None],
        "block_controlnet_hidden_states": residuals,
    }


def _easyanimate(heads: int) -> EasyAnimateTransformer3DModel:
    """Returns an EasyAnimate transformer of two blocks with weights of their own for text, and one without."""
    return EasyAnimateTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=TEXT,
    )


def _framepack(heads: int) -> HunyuanVideoFramepackTransformer3DModel:
    """Returns a FramePack transformer."""
    return HunyuanVideoFramepackTransformer3DModel(
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
        has_image_proj=True,
        image_proj_dim=24,
        has_clean_x_embedder=True,
    )


def _framepack_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, text with a mask, a picture, and three histories, each coarser than the one before."""
    frames, height, width = size.video
    histories = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}
    latents = {key: noise(key, BATCH, 4, count, 2 * height, 2 * width) for key, count in histories.items()}
    places = {f"indices_{key}": torch.arange(count) for key, count in histories.items()}
    return _arguments(size) | {
        **latents,
        **places,
        "encoder_attention_mask": size.mask().long(),
        "pooled_projections": pooled(),
        "image_embeds": noise("picture", BATCH, 6, 24),
        "indices_latents": torch.arange(7, 7 + frames),
        "guidance": torch.full((BATCH,), 6000.0),
    }


def _latte(heads: int) -> LatteTransformer3DModel:
    """Returns a Latte transformer: blocks along a frame, and blocks along time."""
    return LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=HEAD * heads,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=_FRAMES,
    )


def _latte_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of three frames, and text."""
    height, width = size.image
    return _arguments(size) | {"hidden_states": noise("video", BATCH, 4, _FRAMES, 2 * height, 2 * width)}


CASES = (
    case("chronoedit", _chronoedit, _arguments, _BLOCKS, channels=0, note="as wan"),
    case(
        "wan_vace",
        _vace,
        _vace_arguments,
        ("vace_blocks", "blocks"),
        channels=0,
        note="blocks that read a control video, whose hints are added behind other blocks",
    ),
    case(
        "wan_animate",
        _animate,
        _animate_arguments,
        _BLOCKS,
        channels=0,
        note="attention frame by frame between blocks",
    ),
    case("anyflow", _anyflow, _anyflow_arguments, _BLOCKS, channels=1, note="the rotation in a dictionary"),
    case(
        "allegro",
        _allegro,
        _allegro_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        channels=0,
        note="the rotation as tables, and places in them",
    ),
    case(
        "allegro_padded",
        _allegro,
        _allegro_padded_arguments,
        _TRANSFORMER_BLOCKS,
        MASKED,
        channels=0,
        note="a mask of pixels, repeated for each head",
    ),
    case(
        "consisid",
        _consisid,
        _consisid_arguments,
        _TRANSFORMER_BLOCKS,
        channels=1,
        note="as cogvideox, with a face looked at between blocks",
    ),
    case("cosmos", _cosmos, _arguments, _TRANSFORMER_BLOCKS, channels=0, note="positions added in each block"),
    case(
        "cosmos_frames",
        _cosmos,
        _cosmos_frames_arguments,
        _TRANSFORMER_BLOCKS,
        channels=0,
        note="a noise level for each frame, and residuals of a ControlNet",
    ),
    case(
        "easyanimate",
        _easyanimate,
        _arguments,
        _TRANSFORMER_BLOCKS,
        channels=0,
        note="the last block shares its weights between text and video",
    ),
    case(
        "framepack",
        _framepack,
        _framepack_arguments,
        ("transformer_blocks", "single_transformer_blocks"),
        MASKED,
        channels=0,
        note="as hunyuan_video, with three histories before the video",
    ),
    case(
        "latte",
        _latte,
        _latte_arguments,
        ("transformer_blocks", "temporal_transformer_blocks"),
        gain=1.5,
        channels=0,
        note="attention along a frame, then along time",
    ),
)

"""More tiny denoisers, of classes that only tensor parallelism has been proven for so far."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    ChronoEditTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    ErnieImageTransformer2DModel,
    HunyuanVideoFramepackTransformer3DModel,
    MochiTransformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)

from tests.zoo.denoisers import Case
from tests.zoo.denoisers.case import BATCH, HEAD, TEXT, Size, case, noise, picture, pooled, text, times, video

_WAN = {
    "attention_head_dim": HEAD,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}


def _arguments(size: Size) -> dict[str, Any]:
    return {"hidden_states": video(size, 4), "timestep": times(1000.0), "encoder_hidden_states": text(size)}


def _chrono_edit(heads: int) -> ChronoEditTransformer3DModel:
    return ChronoEditTransformer3DModel(num_attention_heads=heads, **_WAN)


def _wan_vace(heads: int) -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(num_attention_heads=heads, vace_layers=[0, 2], vace_in_channels=6, **_WAN)


def _wan_vace_arguments(size: Size) -> dict[str, Any]:
    control = {"control_hidden_states": video(size, 6), "control_hidden_states_scale": torch.tensor([1.0, 0.5])}
    return _arguments(size) | control


def _wan_animate(heads: int) -> WanAnimateTransformer3DModel:
    return WanAnimateTransformer3DModel(
        num_attention_heads=heads,
        **{**_WAN, "in_channels": 12, "num_layers": 4},
        latent_channels=4,
        image_dim=24,
        added_kv_proj_dim=HEAD * heads,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _wan_animate_arguments(size: Size) -> dict[str, Any]:
    latents = video(size, 12)
    frames, height, width = latents.shape[2:]
    return _arguments(size) | {
        "hidden_states": latents,
        "encoder_hidden_states_image": noise("picture", BATCH, 6, 24),
        "pose_hidden_states": noise("pose", BATCH, 4, frames - 1, height, width),
        "face_pixel_values": noise("face", BATCH, 3, 4 * frames - 7, 16, 16),
    }


def _consisid(heads: int) -> ConsisIDTransformer3DModel:
    return ConsisIDTransformer3DModel(
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
    )


def _consisid_arguments(size: Size) -> dict[str, Any]:
    return _arguments(size) | {"hidden_states": video(size, 4).transpose(1, 2).contiguous()}


def _mochi(heads: int) -> MochiTransformer3DModel:
    return MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=3,
        pooled_projection_dim=12 * heads,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=8,
    )


def _mochi_arguments(size: Size) -> dict[str, Any]:
    return _arguments(size) | {"encoder_attention_mask": size.mask()}


def _cosmos(heads: int) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=3,
        text_embed_dim=TEXT,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    )


def _allegro(heads: int) -> AllegroTransformer3DModel:
    return AllegroTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=24,
        num_layers=3,
        cross_attention_dim=24 * heads,
        sample_height=16,
        sample_width=16,
        sample_frames=2,
        caption_channels=TEXT,
    )


def _allegro_arguments(size: Size) -> dict[str, Any]:
    places = torch.meshgrid(*(torch.arange(extent) for extent in size.video), indexing="ij")
    angles = [torch.outer(torch.arange(extent), torch.tensor([1.0, 0.1, 0.01, 0.001])) for extent in size.video]
    tables = tuple((angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)) for angle in angles)
    rotary = (tables, tuple(place.flatten()[None].expand(BATCH, -1) for place in places))
    return _arguments(size) | {"encoder_attention_mask": size.mask().float(), "image_rotary_emb": rotary}


_PASTS = (("clean", 1, 6), ("history_2x", 2, 4), ("history_4x", 4, 0))
"""What a Framepack transformer remembers: name, frames, and the first of them."""


def _framepack(heads: int) -> HunyuanVideoFramepackTransformer3DModel:
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
        has_clean_x_embedder=True,
        image_proj_dim=24,
    )


def _framepack_arguments(size: Size) -> dict[str, Any]:
    _, height, width = size.video
    return _arguments(size) | {
        "encoder_attention_mask": size.mask(),
        "pooled_projections": pooled(),
        "image_embeds": noise("picture", BATCH, 8, 24),
        "indices_latents": torch.arange(7, 7 + size.video[0]),
        **{f"latents_{past}": noise(past, BATCH, 4, frames, 2 * height, 2 * width) for past, frames, _ in _PASTS},
        **{f"indices_latents_{past}": begin + torch.arange(frames) for past, frames, begin in _PASTS},
        "guidance": torch.full((BATCH,), 6000.0),
    }


def _ernie(heads: int) -> ErnieImageTransformer2DModel:
    return ErnieImageTransformer2DModel(
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        num_layers=3,
        ffn_hidden_size=96,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=TEXT,
        rope_axes_dim=(4, 6, 6),
    )


def _ernie_arguments(size: Size) -> dict[str, Any]:
    return {
        "hidden_states": picture(size, 4),
        "timestep": times(1000.0),
        "text_bth": text(size),
        "text_lens": torch.tensor(size.lengths),
    }


_MASKED = ("even", "masked_odd")
CASES: dict[str, Case] = {
    made.name: made
    for made in (
        case("allegro", _allegro, _allegro_arguments, ("transformer_blocks",), _MASKED),
        case("chrono_edit", _chrono_edit, _arguments, ("blocks",)),
        case("consisid", _consisid, _consisid_arguments, ("transformer_blocks",), ("even",)),
        case("cosmos", _cosmos, _arguments, ("transformer_blocks",)),
        case("ernie_image", _ernie, _ernie_arguments, ("layers",), _MASKED),
        case(
            "framepack",
            _framepack,
            _framepack_arguments,
            ("transformer_blocks", "single_transformer_blocks"),
            _MASKED,
        ),
        case("mochi", _mochi, _mochi_arguments, ("transformer_blocks",), _MASKED),
        case("wan_animate", _wan_animate, _wan_animate_arguments, ("blocks", "face_adapter")),
        case("wan_vace", _wan_vace, _wan_vace_arguments, ("blocks", "vace_blocks")),
    )
}

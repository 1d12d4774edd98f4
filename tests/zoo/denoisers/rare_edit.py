"""Denoisers that start from pictures, and that few pipelines use."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFibo2Transformer2DModel,
    Flux3Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    OmniGenTransformer2DModel,
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
    positions,
    text,
    times,
    tokens,
    video,
)


def _joyimage(heads: int) -> JoyImageEditTransformer3DModel:
    """Returns a JoyImage-Edit transformer that rotates text as well."""
    return JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        text_dim=TEXT,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
        rope_type="mrope",
    )


def _joyimage_arguments(size: Size) -> dict[str, Any]:
    """Returns latents of several pictures, as frames, and text."""
    return {
        "hidden_states": video(size, 4),
        "timestep": times(1000.0),
        "encoder_hidden_states": text(size),
    }


def _joyimage_plus(heads: int) -> JoyImageEditPlusTransformer3DModel:
    """Returns a JoyImage-Edit-Plus transformer."""
    return JoyImageEditPlusTransformer3DModel(
        in_channels=4,
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        text_dim=TEXT,
        mlp_width_ratio=2.0,
        num_layers=3,
        rope_dim_list=[4, 6, 6],
    )


def _joyimage_plus_arguments(size: Size) -> dict[str, Any]:
    """Returns patches of shape (batch, tokens, channels, 1, 2, 2) of two pictures, and text with a mask."""
    frames, height, width = size.video
    return {
        "hidden_states": noise("patches", BATCH, size.tokens, 4, 1, 2, 2),
        "timestep": times(1000.0),
        "encoder_hidden_states": text(size),
        "encoder_hidden_states_mask": size.mask().long(),
        "shape_list": [[(1, height, width), (frames - 1, height, width)]] * BATCH,
    }


def _flux3(heads: int) -> Flux3Transformer2DModel:
    """Returns a Flux 3 transformer."""
    return Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=HEAD,
        num_attention_heads=heads,
        joint_attention_dim=TEXT,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux3_arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents, text and the places of both."""
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "timestep": times(),
        "img_ids": positions(size, 4),
        "txt_ids": torch.arange(size.text)[:, None].repeat(1, 4),
    }


def _flux3_edit_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments of Flux 3 and the tokens of a picture to start from."""
    places = positions(size, 4)[:20] + torch.tensor([10.0, 0.0, 0.0, 0.0])
    return _flux3_arguments(size) | {
        "image_cond_hidden_states": noise("picture", BATCH, 20, 8),
        "image_cond_ids": places,
    }


def _bria_fibo2(heads: int) -> BriaFibo2Transformer2DModel:
    """Returns a Bria FIBO 2 transformer, whose third block reads the text once more."""
    return BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=HEAD * heads,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=heads,
        cap_feat_dim=TEXT,
        injection_layer_ids=(2,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )


def _bria_fibo2_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, those of a picture to start from, and two texts of shape (batch, texts, text, width)."""
    return {
        "hidden_states": picture(size, 4),
        "timestep": times(),
        "encoder_hidden_states": noise("text", BATCH, 2, size.text, TEXT),
        "encoder_attention_mask": size.mask() if size.ragged else None,
        "context_latents": [noise("picture", BATCH, 4, 6, 10)],
    }


def _omnigen(heads: int) -> OmniGenTransformer2DModel:
    """Returns an OmniGen transformer."""
    return OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=HEAD * heads,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=64,
        num_layers=3,
        pad_token_id=0,
        vocab_size=32,
        rope_scaling={"long_factor": [1.0] * (HEAD // 2), "short_factor": [1.0] * (HEAD // 2)},
        pos_embed_max_size=16,
        time_step_dim=32,
    )


def _omnigen_arguments(size: Size) -> dict[str, Any]:
    """Returns latents, words padded on the left, and which token sees which: words what is before them."""
    total = size.text + 1 + size.tokens
    places = torch.arange(total)
    sees = torch.ones(BATCH, total, total)
    sees[:, : size.text + 1] = (places[None] <= places[: size.text + 1, None]).float()
    for row, length in enumerate(size.lengths):
        sees[row, :, : size.text - length] = 0
    return {
        "hidden_states": picture(size, 4),
        "timestep": times(),
        "input_ids": torch.arange(BATCH * size.text).view(BATCH, -1) * 5 % 31 + 1,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": sees,
        "position_ids": places.expand(BATCH, -1),
    }


CASES = (
    case(
        "joyimage_edit",
        _joyimage,
        _joyimage_arguments,
        ("double_blocks",),
        channels=0,
        note="a rotation for the picture and one for the text",
    ),
    case(
        "joyimage_edit_plus",
        _joyimage_plus,
        _joyimage_plus_arguments,
        ("double_blocks",),
        MASKED,
        gain=1.5,
        channels=1,
        note="a rotation for each row of the batch",
    ),
    case(
        "flux3",
        _flux3,
        _flux3_arguments,
        ("txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks"),
        note="blocks for each stream before those for all",
    ),
    case(
        "flux3_edit",
        _flux3,
        _flux3_edit_arguments,
        ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks"),
        note="as flux3, with a picture to start from",
    ),
    case(
        "bria_fibo2",
        _bria_fibo2,
        _bria_fibo2_arguments,
        ("noise_refiner", "layers"),
        MASKED,
        channels=0,
        note="the text as a few tokens in one sequence with two pictures; two kinds of modulation, by token",
    ),
    case("omnigen", _omnigen, _omnigen_arguments, ("layers",), MASKED, texts=(), channels=0, note="words see before"),
)

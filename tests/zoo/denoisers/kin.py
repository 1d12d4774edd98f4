"""Denoisers of packed pictures that descend from Flux."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)

from tests.zoo.denoisers.case import BATCH, HEAD, MASKED, TEXT, Size, case, noise, positions, text, times, tokens

_JOINT = ("transformer_blocks", "single_transformer_blocks")
_LAYERS, _SINGLE_LAYERS = 2, 3


def _traits(heads: int) -> dict[str, Any]:
    """Returns what the constructors share."""
    return {
        "in_channels": 16,
        "num_layers": _LAYERS,
        "num_single_layers": _SINGLE_LAYERS,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
    }


def _arguments(size: Size) -> dict[str, Any]:
    """Returns packed latents, text and the places of both."""
    return {
        "hidden_states": tokens(size, 16),
        "encoder_hidden_states": text(size),
        "timestep": times(),
        "img_ids": positions(size),
        "txt_ids": torch.zeros(size.text, 3),
    }


def _joint_mask(size: Size) -> torch.Tensor:
    """Returns which tokens of text and picture are valid, as booleans of shape (batch, text + tokens)."""
    return torch.cat([size.mask(), torch.ones(BATCH, size.tokens, dtype=torch.bool)], dim=1)


def _chroma(heads: int) -> ChromaTransformer2DModel:
    """Returns a Chroma transformer: the modulation of all blocks comes from one approximator."""
    return ChromaTransformer2DModel(
        **_traits(heads), approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=2
    )


def _chroma_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments with a mask of text and picture in floats, as the pipeline passes it."""
    return _arguments(size) | {"attention_mask": _joint_mask(size).float()}


def _bria(heads: int) -> BriaTransformer2DModel:
    """Returns a Bria transformer."""
    return BriaTransformer2DModel(**_traits(heads), pooled_projection_dim=TEXT)


def _bria_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments with timesteps as the scheduler has them."""
    return _arguments(size) | {"timestep": times(1000.0)}


def _bria_fibo(heads: int) -> BriaFiboTransformer2DModel:
    """Returns a Bria FIBO transformer: each block reads a layer of the text encoder of its own."""
    return BriaFiboTransformer2DModel(**_traits(heads), text_encoder_dim=24)


def _bria_fibo_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments with one text per block; as in the pipeline, a mask only where a prompt is padded."""
    masked = {"attention_mask": _joint_mask(size)[:, None, None, :]} if size.ragged else {}
    return _bria_arguments(size) | {
        "text_encoder_layers": list(noise("layers", _LAYERS + _SINGLE_LAYERS, BATCH, size.text, 24)),
        "joint_attention_kwargs": masked,
    }


def _longcat(heads: int) -> LongCatImageTransformer2DModel:
    """Returns a LongCat-Image transformer."""
    return LongCatImageTransformer2DModel(**_traits(heads), pooled_projection_dim=TEXT)


def _longcat_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments with places for the text, and the picture placed after it."""
    places = torch.arange(size.text)[:, None]
    ids = positions(size) + size.text * torch.tensor([0.0, 1.0, 1.0]) + torch.tensor([1.0, 0.0, 0.0])
    return _arguments(size) | {"img_ids": ids, "txt_ids": places * torch.tensor([0.0, 1.0, 1.0])}


def _ovis(heads: int) -> OvisImageTransformer2DModel:
    """Returns an Ovis-Image transformer."""
    return OvisImageTransformer2DModel(**_traits(heads), out_channels=16)


def _ovis_arguments(size: Size) -> dict[str, Any]:
    """Returns the arguments with places for the text."""
    return _arguments(size) | {"txt_ids": torch.arange(size.text)[:, None] * torch.tensor([0.0, 1.0, 1.0])}


CASES = (
    case(
        "chroma",
        _chroma,
        _chroma_arguments,
        _JOINT,
        MASKED,
        leaks=True,
        note="one tensor modulates all blocks; a mask in floats, which attention adds as a bias",
    ),
    case("bria", _bria, _bria_arguments, _JOINT, note="as flux"),
    case(
        "longcat_image",
        _longcat,
        _longcat_arguments,
        _JOINT,
        note="as flux, but for the places of the text",
    ),
    case("ovis_image", _ovis, _ovis_arguments, _JOINT, note="as flux, with gated feed-forward layers"),
    case(
        "bria_fibo",
        _bria_fibo,
        _bria_fibo_arguments,
        _JOINT,
        MASKED,
        texts=("encoder_hidden_states", "text_encoder_layers"),
        note="a list with one text per block; a mask among the attention arguments",
    ),
)

"""Which layers of a denoiser are cut by tensor parallelism, and how: one entry for each class that diffusers has no
`_tp_plan` for.

An entry maps paths in the denoiser (`*` is one name between dots) to what happens there:

    COLWISE    each rank holds some of the outputs of a linear layer
    ROWWISE    each rank holds some of the inputs; the ranks' outputs are summed, and the bias is added to the sum
    NORM       a root-mean-square norm over the width that COLWISE layers before it have cut
    Local(..)  attributes that count heads or widths, by which processors reshape: divided by the number of ranks

A path that a configuration of the class leaves out is skipped. Everything that is not named stays whole on every rank.
Here stand only classes for which a test compares the result with that of one rank.

Owns the notation and the table. Does not know ranks, or how anything is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers.hooks.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel
from diffusers.models.activations import GEGLU, SwiGLU
from torch import nn

from penstock.errors import DeclarationError

Parts = Callable[[nn.Linear, nn.Module], Sequence[int]]
"""From a layer and the module that holds it: widths, side by side along the dim, each of which is cut."""


@dataclass(frozen=True)
class Split:
    """A linear layer that is cut.

    Attributes:
        dim: of the weight: 0 for its outputs ("colwise"), 1 for its inputs ("rowwise").
        parts: what lies side by side along the dim.
    """

    dim: int
    parts: Parts


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm over all heads at once."""


@dataclass(frozen=True)
class Local:
    """A module that knows how many heads, or how wide, it is.

    Attributes:
        attributes: whole numbers that are divided by the number of ranks; those that it has not are skipped.
        rotary: arguments of its forward, given by name, that hold a rotation for all heads: a tuple of tensors.
        rotary_dims: by the number of a rotation's dims, the one of heads, or of the width of all heads.
    """

    attributes: tuple[str, ...]
    rotary: tuple[str, ...] = ()
    rotary_dims: Mapping[int, int] = field(default_factory=dict)


Style = Split | Norm | Local
TensorPlan = Mapping[str, Style]


def _dense(layer: nn.Linear, holder: nn.Module) -> Sequence[int]:
    """The outputs; where they are a gate and what it opens, two halves."""
    is_gated = isinstance(holder, (GEGLU, SwiGLU))
    return (layer.out_features // 2,) * 2 if is_gated else (layer.out_features,)


COLWISE = Split(0, _dense)
GATED = Split(0, lambda layer, holder: (layer.out_features // 2,) * 2)
ROWWISE = Split(1, lambda layer, holder: (layer.in_features,))
BESIDE = Split(1, lambda layer, holder: (layer.out_features, layer.in_features - layer.out_features))
"""Inputs that are those of attention, as wide as the output, and then those of the feed-forward."""
NORM = Norm()
HEADS = Local(("heads", "num_heads", "inner_dim", "inner_kv_dim", "kv_inner_dim"))


def _under(path: str, *groups: TensorPlan) -> dict[str, Style]:
    """The entries of all groups, below a path."""
    return {f"{path}.{inner}".rstrip("."): style for group in groups for inner, style in group.items()}


def _inputs(*names: str) -> dict[str, Style]:
    return dict.fromkeys(names, COLWISE)


def _turning(rotary_dims: Mapping[int, int], *arguments: str) -> dict[str, Style]:
    """Attention whose rotation is not the same for all heads."""
    return {"": Local(HEADS.attributes, arguments, rotary_dims)}


_QUERIES = {**_inputs("to_q", "to_k", "to_v"), "": HEADS}
_ATTENTION = {**_QUERIES, "to_out.0": ROWWISE}
_ADDED = {**_inputs("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out": ROWWISE}
_JOINT = {**_ATTENTION, **_ADDED}
_NORMED = {**_ATTENTION, "norm_q": NORM, "norm_k": NORM}
_FEED_FORWARD = {"net.0.proj": COLWISE, "net.2": ROWWISE}

_DOUBLE_BLOCKS = {
    **_under("transformer_blocks.*.attn", _JOINT),
    **_under("transformer_blocks.*.ff", _FEED_FORWARD),
    **_under("transformer_blocks.*.ff_context", _FEED_FORWARD),
}
_SINGLE_BLOCKS = {
    **_under("single_transformer_blocks.*.attn", _QUERIES),
    **_under("single_transformer_blocks.*", {"proj_mlp": COLWISE, "proj_out": BESIDE}),
}
_FLUX = {**_DOUBLE_BLOCKS, **_SINGLE_BLOCKS}
_OVIS = {
    **_FLUX,
    "single_transformer_blocks.*.proj_mlp": GATED,
    "single_transformer_blocks.*": Local(("mlp_hidden_dim",)),
}
_REFINER = {
    **_under("context_embedder.token_refiner.refiner_blocks.*.attn", _ATTENTION),
    **_under("context_embedder.token_refiner.refiner_blocks.*.ff", _FEED_FORWARD),
}
_HUNYUAN = {**_REFINER, **_FLUX}


def _wan(stack: str) -> dict[str, Style]:
    """Wan's blocks: norms across heads, and a picture's keys and values beside the text's."""
    picture = {**_inputs("add_k_proj", "add_v_proj"), "norm_added_k": NORM}
    return {
        **_under(f"{stack}.*.attn1", _NORMED),
        **_under(f"{stack}.*.attn2", _NORMED, picture),
        **_under(f"{stack}.*.ffn", _FEED_FORWARD),
    }


def _gated_stack(stack: str, attention: str, down: str, *up: str) -> dict[str, Style]:
    """Blocks whose feed-forward multiplies two linear layers."""
    feed_forward = {**_inputs(*up), down: ROWWISE}
    return {**_under(f"{stack}.*.{attention}", _ATTENTION), **_under(f"{stack}.*.feed_forward", feed_forward)}


def _z_image(stack: str) -> dict[str, Style]:
    return _gated_stack(stack, "attention", "w2", "w1", "w3")


def _lumina2(stack: str) -> dict[str, Style]:
    return _gated_stack(stack, "attn", "linear_2", "linear_1", "linear_3")


_AURA_FEED_FORWARD = {**_inputs("linear_1", "linear_2"), "out_projection": ROWWISE}
_AURA = {
    **_under("joint_transformer_blocks.*.attn", _JOINT),
    **_under("joint_transformer_blocks.*.ff", _AURA_FEED_FORWARD),
    **_under("joint_transformer_blocks.*.ff_context", _AURA_FEED_FORWARD),
    **_under("single_transformer_blocks.*.attn", _ATTENTION),
    **_under("single_transformer_blocks.*.ff", _AURA_FEED_FORWARD),
}

_SELF_ATTENTION = {
    **_under("transformer_blocks.*.attn1", _ATTENTION),
    **_under("transformer_blocks.*.ff", _FEED_FORWARD),
}
_CROSS_ATTENTION = {**_SELF_ATTENTION, **_under("transformer_blocks.*.attn2", _ATTENTION)}

_MOCHI = {
    **_under("transformer_blocks.*.attn1", _JOINT, _turning({3: 1}, "image_rotary_emb")),
    **_under("transformer_blocks.*.ff", _FEED_FORWARD),
    **_under("transformer_blocks.*.ff_context", _FEED_FORWARD),
}
_ERNIE = {
    **_under("layers.*.self_attention", _ATTENTION),
    **_under("layers.*.mlp", {**_inputs("gate_proj", "up_proj"), "linear_fc2": ROWWISE}),
}

_LTX = {
    **_under("transformer_blocks.*.attn1", _NORMED, _turning({3: 2}, "image_rotary_emb")),
    **_under("transformer_blocks.*.attn2", _NORMED),
    **_under("transformer_blocks.*.ff", _FEED_FORWARD),
}
_LTX2_ATTENTION = {
    **_NORMED,
    "to_gate_logits": COLWISE,
    **_turning({3: 2, 4: 1}, "query_rotary_emb", "key_rotary_emb"),
}
_LTX2 = {
    **{
        path: style
        for attention in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        for path, style in _under(f"transformer_blocks.*.{attention}", _LTX2_ATTENTION).items()
    },
    **_under("transformer_blocks.*.ff", _FEED_FORWARD),
    **_under("transformer_blocks.*.audio_ff", _FEED_FORWARD),
}


def _kandinsky5(stack: str) -> dict[str, Style]:
    attention = {**_inputs("to_query", "to_key", "to_value"), "out_layer": ROWWISE, "": HEADS}
    return {
        **_under(f"{stack}.*.self_attention", attention),
        **_under(f"{stack}.*.cross_attention", attention),
        **_under(f"{stack}.*.feed_forward", {"in_layer": COLWISE, "out_layer": ROWWISE}),
    }


PLANS: dict[str, TensorPlan] = {
    "AllegroTransformer3DModel": _CROSS_ATTENTION,
    "AuraFlowTransformer2DModel": _AURA,
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "ChronoEditTransformer3DModel": _wan("blocks"),
    "CogVideoXTransformer3DModel": _SELF_ATTENTION,
    "CogView3PlusTransformer2DModel": _SELF_ATTENTION,
    "CogView4Transformer2DModel": _SELF_ATTENTION,
    "ConsisIDTransformer3DModel": _SELF_ATTENTION,
    "CosmosTransformer3DModel": _CROSS_ATTENTION,
    "ErnieImageTransformer2DModel": _ERNIE,
    "GlmImageTransformer2DModel": _SELF_ATTENTION,
    "HunyuanImageTransformer2DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": {**_REFINER, **_DOUBLE_BLOCKS},
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "Kandinsky5Transformer3DModel": {
        **_kandinsky5("text_transformer_blocks"),
        **_kandinsky5("visual_transformer_blocks"),
    },
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": _LTX,
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": {**_lumina2("noise_refiner"), **_lumina2("context_refiner"), **_lumina2("layers")},
    "MochiTransformer3DModel": _MOCHI,
    "OvisImageTransformer2DModel": _OVIS,
    "PixArtTransformer2DModel": _CROSS_ATTENTION,
    "SD3Transformer2DModel": {**_DOUBLE_BLOCKS, **_under("transformer_blocks.*.attn2", _ATTENTION)},
    "SkyReelsV2Transformer3DModel": _wan("blocks"),
    "WanAnimateTransformer3DModel": {**_wan("blocks"), **_under("face_adapter.*", {**_QUERIES, "to_out": ROWWISE})},
    "WanTransformer3DModel": _wan("blocks"),
    "WanVACETransformer3DModel": {**_wan("blocks"), **_wan("vace_blocks")},
    "ZImageTransformer2DModel": {**_z_image("noise_refiner"), **_z_image("context_refiner"), **_z_image("layers")},
}


_CORRECTION = (
    'Give each path "colwise", "rowwise", PackedColwiseParallel(...) or PackedRowwiseParallel(...), or leave '
    "--tensor-parallel-size at 1"
)


def tensor_plan_of(denoiser: nn.Module) -> TensorPlan | None:
    """The plan of a denoiser: its class's own `_tp_plan`, else the table's entry for the class or the nearest above it.

    Returns:
        None where there is neither.

    Raises:
        DeclarationError: for a `_tp_plan` that is no mapping, or has a style that diffusers does not know.
    """
    declared: Mapping[str, object] | None = getattr(denoiser, "_tp_plan", None)
    if declared:
        name = type(denoiser).__name__
        if not isinstance(declared, Mapping):
            raise DeclarationError(
                f"the `_tp_plan` of {name} is a {type(declared).__name__}, no mapping from paths of layers to styles. "
                f"{_CORRECTION}."
            )
        return {path: _of_diffusers(name, path, style) for path, style in declared.items()}
    for owner in type(denoiser).__mro__:
        if owner.__name__ in PLANS:
            return PLANS[owner.__name__]
    return None


def _of_diffusers(owner: str, path: str, style: object) -> Split:
    """A style of diffusers' own notation. Its processors find out by themselves how many heads there are."""
    if style == "colwise":
        return Split(0, lambda layer, holder: (layer.out_features,))
    if style == "rowwise":
        return ROWWISE
    if isinstance(style, PackedColwiseParallel):
        blocks = style.blocks
        return Split(0, lambda layer, holder: _proportions(layer.out_features, blocks or layer._tp_packed_col_blocks))
    if isinstance(style, PackedRowwiseParallel):
        blocks = style.blocks
        return Split(1, lambda layer, holder: _proportions(layer.in_features, blocks or layer._tp_packed_row_blocks))
    raise DeclarationError(
        f"the `_tp_plan` of {owner} gives {path!r} the style {style!r}, which diffusers does not know, so that nothing "
        f"says how the layer is cut. {_CORRECTION}."
    )


def _proportions(width: int, blocks: Any) -> Sequence[int]:
    return tuple(width * block // sum(blocks) for block in blocks)

"""Rows of denoisers that make pictures."""

from __future__ import annotations

from dataclasses import replace

from penstock.models.rows.row import Row, StackRow

_JOINT = {"hidden_states": "img", "encoder_hidden_states": "txt"}
_ROTATED = {**_JOINT, "image_rotary_emb": "txt+img:0"}
_TXT_IMG = ("txt", "img")
_IMG_TXT = ("img", "txt")
_BLOCKS = "transformer_blocks"
_SINGLE = "single_transformer_blocks"
_CACHE = "its keys and values are kept whole"

_FLUX = Row(
    stacks=(StackRow(_BLOCKS, _ROTATED, _TXT_IMG), StackRow(_SINGLE, _ROTATED, _TXT_IMG)),
    attention={"attn": "txt+img"},
    ends={"norm_out": "img"},
)
_FLUX_WITH_RESIDUALS = replace(
    _FLUX, residuals={"controlnet_block_samples": "img", "controlnet_single_block_samples": "img"}
)
_REFINED = Row(
    stacks=(
        StackRow("noise_refiner", {"x": "img", "freqs_cis": "img", "noise_mask": "img"}, ("img",), is_closed=True),
        StackRow("layers", {"x": "all", "freqs_cis": "all", "noise_mask": "all"}, ("all",)),
    ),
    attention={"noise_refiner.attention": "img", "layers.attention": "all"},
)
_CROSS = Row(
    stacks=(StackRow(_BLOCKS, {"hidden_states": "img", "attention_mask": "img:2"}, ("img",)),),
    attention={"attn1": "img"},  # attn2 looks at the text, which is whole on every rank
)
_COGVIEW4 = Row(
    stacks=(StackRow(_BLOCKS, {**_JOINT, "attention_mask": "txt", "image_rotary_emb": "img:0"}, _IMG_TXT),),
    attention={"attn1": "txt+img"},
    masks="outer",
    ends={"norm_out": "img"},
)


def _flux3_mode(path: str, stream: str, is_closed: bool = False) -> StackRow:
    takes = {"hidden_states": stream, "temb_mod": stream, "image_rotary_emb": f"{stream}:0"}
    return StackRow(path, takes, (stream,), is_closed)


ROWS: dict[str, Row] = {
    "FluxTransformer2DModel": _FLUX_WITH_RESIDUALS,
    "BriaTransformer2DModel": replace(
        _FLUX,
        residuals={"controlnet_block_samples": "img"},
        refuses={
            "controlnet_single_block_samples": "they are added from the place in the picture where a text would end"
        },
    ),
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {**_ROTATED, "attention_mask": "txt+img"}, _TXT_IMG),
            StackRow(
                _SINGLE,
                {"hidden_states": "txt+img", "image_rotary_emb": "txt+img:0", "attention_mask": "txt+img"},
                ("txt+img",),
            ),
        ),
        attention={"attn": "txt+img"},
        ends={"norm_out": "img"},
        residuals=_FLUX_WITH_RESIDUALS.residuals,
        masks="outer",
    ),
    "BriaFiboTransformer2DModel": Row(
        stacks=(
            StackRow(_BLOCKS, _ROTATED, _TXT_IMG),
            StackRow(_SINGLE, {"hidden_states": "txt+img", "image_rotary_emb": "txt+img:0"}, ("txt+img",)),
        ),
        attention={"attn": "txt+img"},
        whole=("txt",),  # half of its channels are replaced before each block
        ends={"norm_out": "img"},
    ),
    "Flux2Transformer2DModel": Row(
        stacks=(
            StackRow(_BLOCKS, _ROTATED, _TXT_IMG),
            StackRow(_SINGLE, {"hidden_states": "txt+img", "image_rotary_emb": "txt+img:0"}, ("txt+img",)),
        ),
        attention={"attn": "txt+img"},
        refuses={"kv_cache": _CACHE, "kv_cache_mode": _CACHE},
    ),
    "SD3Transformer2DModel": Row(
        stacks=(StackRow(_BLOCKS, _JOINT, _TXT_IMG),),
        attention={"attn": "img+txt", "attn2": "img"},
        ends={"norm_out": "img"},
        residuals={"block_controlnet_hidden_states": "img"},
    ),
    "QwenImageTransformer2DModel": Row(
        stacks=(
            StackRow(
                _BLOCKS,
                {
                    **_JOINT,
                    "encoder_hidden_states_mask": "txt",
                    "image_rotary_emb": ("img:0", "txt:0"),
                    "modulate_index": "img",
                },
                _TXT_IMG,
            ),
        ),
        attention={"attn": "txt+img"},
        ends={"norm_out": "img"},
        residuals={"controlnet_block_samples": "img"},
    ),
    "ZImageTransformer2DModel": replace(
        _REFINED, ends={r"all_final_layer\.[^.]+": "all"}, residuals={"controlnet_block_samples": "all"}
    ),
    "Lumina2Transformer2DModel": Row(
        stacks=(
            StackRow("noise_refiner", {"hidden_states": "img", "image_rotary_emb": "img"}, ("img",), is_closed=True),
            StackRow("layers", {"hidden_states": "all", "image_rotary_emb": "all"}, ("all",)),
        ),
        attention={"noise_refiner.attn": "img", "layers.attn": "all"},
    ),
    "CogView3PlusTransformer2DModel": Row(
        stacks=(StackRow(_BLOCKS, _JOINT, _IMG_TXT),),
        attention={"attn1": "txt+img"},
        ends={"norm_out": "img"},
    ),
    "CogView4Transformer2DModel": _COGVIEW4,
    "GlmImageTransformer2DModel": replace(_COGVIEW4, refuses={"kv_caches": _CACHE}),
    "AuraFlowTransformer2DModel": Row(
        stacks=(
            StackRow("joint_transformer_blocks", _JOINT, _TXT_IMG),
            StackRow(_SINGLE, {"hidden_states": "txt+img"}, ("txt+img",)),
        ),
        attention={"attn": "txt+img"},
        ends={"norm_out": "img"},
    ),
    "PixArtTransformer2DModel": _CROSS,
    "HiDreamImageTransformer2DModel": Row(
        stacks=(
            StackRow(
                "double_stream_blocks",
                {**_JOINT, "hidden_states_masks": "img", "image_rotary_emb": "img+txt"},
                _IMG_TXT,
            ),
            StackRow(
                "single_stream_blocks",
                {"hidden_states": "img+txt", "hidden_states_masks": "img+txt", "image_rotary_emb": "img+txt"},
                ("img+txt",),
            ),
        ),
        attention={"block.attn1": "img+txt"},
        whole=("txt",),  # a part of it is replaced before each block
        ends={"final_layer": "img"},
    ),
    "HunyuanImageTransformer2DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {**_JOINT, "image_rotary_emb": "img:0"}, _IMG_TXT),
            StackRow(_SINGLE, {**_JOINT, "image_rotary_emb": "img:0"}, _IMG_TXT),
        ),
        attention={"attn": "img+txt"},
        ends={"norm_out": "img"},
    ),
    "Krea2Transformer2DModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "all", "image_rotary_emb": "all:0"}, ("all",)),),
        attention={"attn": "all"},
    ),
    "PRXTransformer2DModel": Row(
        stacks=(StackRow("blocks", {**_JOINT, "image_rotary_emb": "img:2"}, ("img",)),),
        attention={"attention": ("img", "txt+img")},
        whole=("txt",),
    ),
    "ErnieImageTransformer2DModel": Row(
        stacks=(StackRow("layers", {"x": "all:0", "rotary_pos_emb": "all", "temb": "all:0"}, ("all:0",)),),
        attention={"self_attention": "all"},
    ),
    "JoyImageEditTransformer3DModel": Row(
        stacks=(StackRow("double_blocks", {**_JOINT, "image_rotary_emb": ("img:0", "txt:0")}, _IMG_TXT),),
        attention={"attn": "img+txt"},
        ends={"norm_out": "img"},
    ),
    "JoyImageEditPlusTransformer3DModel": Row(
        stacks=(StackRow("double_blocks", {**_JOINT, "image_rotary_emb": "img"}, _IMG_TXT),),
        attention={"attn": "img+txt"},
        ends={"norm_out": "img"},
    ),
    "Ideogram4Transformer2DModel": Row(
        stacks=(
            StackRow("layers", {"hidden_states": "all", "image_rotary_emb": "all", "adaln_input": "all"}, ("all",)),
        ),
        attention={"attention": "all"},
    ),
    "DiTTransformer2DModel": _CROSS,
    "HunyuanDiT2DModel": Row(
        stacks=(StackRow("blocks", {"hidden_states": "img", "image_rotary_emb": "img:0", "skip": "img"}, ("img",)),),
        attention={"attn1": "img"},
        ends={"norm_out": "img"},
        residuals={"controlnet_block_samples": "img"},
    ),
    "OmniGenTransformer2DModel": Row(
        stacks=(StackRow("layers", {"hidden_states": "all", "image_rotary_emb": "all:-2"}, ("all",)),),
        attention={"self_attn": "all"},
    ),
    "Flux3Transformer2DModel": Row(
        stacks=(
            _flux3_mode("txt_mode_blocks", "txt"),
            _flux3_mode("mode_blocks.image", "img", is_closed=True),  # put together with the picture to start from
            _flux3_mode("mode_blocks.image_cond", "cond", is_closed=True),
            StackRow(
                _SINGLE,
                {
                    "hidden_states": "all",
                    "encoder_hidden_states": "txt",
                    "temb_mod": "all",
                    "temb_mod_context": "txt",
                    "image_rotary_emb": "txt+all:0",
                },
                ("txt", "all"),
            ),
        ),
        attention={
            "txt_mode_blocks.attn": "txt",
            "mode_blocks.image.attn": "img",
            "mode_blocks.image_cond.attn": "cond",
            f"{_SINGLE}.attn": "txt+all",
        },
    ),
    "BriaFibo2Transformer2DModel": _REFINED,
}

"""Rows of further denoisers, each used by few pipelines."""

from __future__ import annotations

from penstock.models.rows.row import Row, StackRow

_BLOCKS = "transformer_blocks"
_SINGLE = "single_transformer_blocks"
_IMG_TXT = ("img", "txt")
_WAN = {"hidden_states": "img", "temb": "img:1/4", "rotary_emb": "img"}
_STREAMS = {"hidden_states": "img", "encoder_hidden_states": "txt"}
_JOINT = {**_STREAMS, "image_rotary_emb": "img:0"}
_MASKS = "a mask of pixels differs between heads, once it is prepared"


def _modulated(stream: str) -> dict[str, str]:
    """What a block of Flux 3 takes."""
    return {"hidden_states": stream, "temb_mod": stream, "image_rotary_emb": f"{stream}:0"}


ROWS: dict[str, Row] = {
    "ChronoEditTransformer3DModel": Row(stacks=(StackRow("blocks", _WAN, ("img",)),), attention={"attn1": "img"}),
    "WanVACETransformer3DModel": Row(
        stacks=(
            StackRow("vace_blocks", {**_WAN, "control_hidden_states": "img"}, ("img", "img")),
            StackRow("blocks", _WAN, ("img",)),
        ),
        attention={"attn1": "img"},
        ends={"norm_out": "img"},  # a hint may be added behind the last block
    ),
    "WanAnimateTransformer3DModel": Row(
        stacks=(StackRow("blocks", _WAN, ("img",), is_apart=True),),  # between blocks, each frame looks at its face
        attention={"attn1": "img"},
    ),
    "AnyFlowTransformer3DModel": Row(
        stacks=(StackRow("blocks", {"hidden_states": "img", "temb": "img", "rotary_emb": "img:2"}, ("img",)),),
        attention={"attn1": "img"},
    ),
    "AllegroTransformer3DModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "img", "image_rotary_emb": ("", "img")}, ("img",)),),
        attention={"attn1": "img"},
        refuses={"attention_mask": _MASKS},
    ),
    "ConsisIDTransformer3DModel": Row(stacks=(StackRow(_BLOCKS, _JOINT, _IMG_TXT),), attention={"attn1": "txt+img"}),
    "CosmosTransformer3DModel": Row(
        stacks=(
            StackRow(
                _BLOCKS,
                {
                    "hidden_states": "img",
                    "embedded_timestep": "img:1/3",
                    "temb": "img:1/3",
                    "image_rotary_emb": "img:0",
                    "extra_pos_emb": "img",
                    "controlnet_residual": "img",
                },
                ("img",),
            ),
        ),
        attention={"attn1": "img"},
    ),
    "EasyAnimateTransformer3DModel": Row(stacks=(StackRow(_BLOCKS, _JOINT, _IMG_TXT),), attention={"attn1": "txt+img"}),
    "HunyuanVideoFramepackTransformer3DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {**_STREAMS, "freqs_cis": "img:0"}, _IMG_TXT),
            StackRow(_SINGLE, _JOINT, _IMG_TXT),
        ),
        attention={"attn": "img+txt"},
    ),
    "LatteTransformer3DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {"hidden_states": "img"}, ("img",), is_apart=True),
            StackRow("temporal_transformer_blocks", {"hidden_states": "frm"}, ("frm",), is_apart=True),
        ),
        attention={"transformer_blocks.attn1": "img", "temporal_transformer_blocks.attn1": "frm"},
    ),
    "Krea2Transformer2DModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "all", "image_rotary_emb": "all:0"}, ("all",)),),
        attention={"attn": "all"},
    ),
    "PRXTransformer2DModel": Row(
        stacks=(StackRow("blocks", {**_STREAMS, "image_rotary_emb": "img:2"}, ("img",)),),
        attention={"attention": ("img", "txt+img")},
        whole=("txt",),  # it is never a query
    ),
    "ErnieImageTransformer2DModel": Row(
        stacks=(StackRow("layers", {"x": "all:0", "rotary_pos_emb": "all", "temb": "all:0"}, ("all:0",)),),
        attention={"self_attention": "all"},
    ),
    "JoyImageEditTransformer3DModel": Row(
        stacks=(StackRow("double_blocks", {**_STREAMS, "image_rotary_emb": ("img:0", "txt:0")}, _IMG_TXT),),
        attention={"attn": "img+txt"},
    ),
    "JoyImageEditPlusTransformer3DModel": Row(
        stacks=(StackRow("double_blocks", {**_STREAMS, "image_rotary_emb": "img"}, _IMG_TXT),),
        attention={"attn": "img+txt"},
    ),
    "Ideogram4Transformer2DModel": Row(
        stacks=(
            StackRow("layers", {"hidden_states": "all", "image_rotary_emb": "all", "adaln_input": "all"}, ("all",)),
        ),
        attention={"attention": "all"},
    ),
    "DiTTransformer2DModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "img"}, ("img",)),), attention={"attn1": "img"}
    ),
    "HunyuanDiT2DModel": Row(
        stacks=(StackRow("blocks", {"hidden_states": "img", "image_rotary_emb": "img:0", "skip": "img"}, ("img",)),),
        attention={"attn1": "img"},
        residuals={"controlnet_block_samples": "img"},
    ),
    "Flux3Transformer2DModel": Row(
        stacks=(
            StackRow("txt_mode_blocks", _modulated("txt"), ("txt",)),
            StackRow("mode_blocks.image", _modulated("img"), ("img",), is_closed=True),
            StackRow("mode_blocks.image_cond", _modulated("cnd"), ("cnd",), is_closed=True),
            StackRow(
                _SINGLE,
                {
                    **_modulated("all"),
                    "encoder_hidden_states": "txt",
                    "temb_mod_context": "txt",
                    "image_rotary_emb": "txt+all:0",
                },
                ("txt", "all"),
            ),
        ),
        attention={
            "txt_mode_blocks.attn": "txt",
            "mode_blocks.image.attn": "img",
            "mode_blocks.image_cond.attn": "cnd",
            "single_transformer_blocks.attn": "txt+all",
        },
    ),
    "BriaFibo2Transformer2DModel": Row(
        stacks=(
            StackRow("noise_refiner", {"x": "img", "freqs_cis": "img", "noise_mask": "img"}, ("img",), is_closed=True),
            StackRow("layers", {"x": "all", "freqs_cis": "all", "noise_mask": "all"}, ("all",)),
        ),
        attention={"noise_refiner.attention": "img", "layers.attention": "all"},
    ),
    "OmniGenTransformer2DModel": Row(
        stacks=(StackRow("layers", {"hidden_states": "all", "image_rotary_emb": "all:0"}, ("all",)),),
        attention={"self_attn": "all"},
    ),
    "StableAudioDiTModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "all", "rotary_embedding": "all:0"}, ("all",)),),
        attention={"attn1": "all"},
        refuses={"attention_mask": _MASKS},
    ),
    "StableAudio3DiTModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "all", "rope": "all:0"}, ("all",)),),
        attention={"self_attn": "all"},
        refuses={"local_add_cond": "its blocks add it to the tokens behind the learnt ones"},
    ),
    "LongCatAudioDiTTransformer": Row(
        stacks=(StackRow("blocks", {"hidden_states": "aud", "mask": "aud", "rope": "aud:0"}, ("aud",)),),
        attention={"self_attn": "aud"},
    ),
    "MiniMaxH3Transformer3DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {"hidden_states": "all", "adaln_indices": "all:0", "rotary_emb": "all:0"}, ("all",)),
        ),
        attention={"attn": "all"},
    ),
    "Kandinsky6Transformer3DModel": Row(
        stacks=(
            StackRow(
                "visual_transformer_blocks",
                {"vis": "img", "aud": "aud", "vis_rope": "img:0", "aud_rope": "aud:0"},
                ("img", "aud"),
            ),
        ),
        attention={
            "video_dec_block.self_attention": "img",
            "audio_dec_block.self_attention": "aud",
            "va_cross_attention": ("img", "aud"),
            "av_cross_attention": ("aud", "img"),
        },
    ),
}

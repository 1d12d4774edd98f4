"""Rows of denoisers that make video, with or without sound."""

from __future__ import annotations

from dataclasses import replace

from penstock.models.rows.row import Row, StackRow

_JOINT = {"hidden_states": "img", "encoder_hidden_states": "txt"}
_IMG_TXT = ("img", "txt")
_BLOCKS = "transformer_blocks"
_SINGLE = "single_transformer_blocks"

_WAN = Row(
    stacks=(StackRow("blocks", {"hidden_states": "img", "temb": "img:1/4", "rotary_emb": "img"}, ("img",)),),
    attention={"attn1": "img"},  # attn2 looks at the text, which is whole on every rank
)
_COGVIDEOX = Row(
    stacks=(StackRow(_BLOCKS, {**_JOINT, "image_rotary_emb": "img:0"}, _IMG_TXT),),
    attention={"attn1": "txt+img"},
    ends={"norm_final": "img"},
)
_HUNYUAN_VIDEO = Row(
    stacks=(
        StackRow(_BLOCKS, {**_JOINT, "freqs_cis": "img:0", "num_tokens": "img"}, _IMG_TXT),
        StackRow(_SINGLE, {**_JOINT, "image_rotary_emb": "img:0", "num_tokens": "img"}, _IMG_TXT),
    ),
    attention={"attn": "img+txt"},
    ends={"norm_out": "img"},
)

ROWS: dict[str, Row] = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": replace(
        _WAN,
        stacks=(StackRow("blocks", {"hidden_states": "img", "temb": "img:2/4", "rotary_emb": "img"}, ("img",)),),
    ),
    "ChronoEditTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": replace(
        _WAN,
        stacks=(
            StackRow(
                "vace_blocks",
                {"hidden_states": "img", "control_hidden_states": "img", "rotary_emb": "img"},
                ("img", "img"),
            ),
            *_WAN.stacks,
        ),
        ends={"norm_out": "img"},
    ),
    "WanAnimateTransformer3DModel": replace(_WAN, between={r"face_adapter\.\d+": "img"}, ends={"norm_out": "img"}),
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": replace(_COGVIDEOX, ends={"norm_final": "txt+img"}),
    "EasyAnimateTransformer3DModel": _COGVIDEOX,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideoFramepackTransformer3DModel": replace(_HUNYUAN_VIDEO, ends={}),
    "HunyuanVideo15Transformer3DModel": Row(
        stacks=(StackRow(_BLOCKS, {**_JOINT, "attention_mask": "txt", "freqs_cis": "img:0"}, _IMG_TXT),),
        attention={"attn": "img+txt"},
        ends={"norm_out": "img"},
        masks="keys",
    ),
    "LTXVideoTransformer3DModel": Row(
        stacks=(StackRow(_BLOCKS, {"hidden_states": "img", "temb": "img", "image_rotary_emb": "img"}, ("img",)),),
        attention={"attn1": "img"},
    ),
    "LTX2VideoTransformer3DModel": Row(
        stacks=(
            StackRow(
                _BLOCKS,
                {
                    "hidden_states": "vid",
                    "audio_hidden_states": "aud",
                    "temb": "vid",
                    "temb_audio": "aud",
                    "temb_ca_scale_shift": "vid",
                    "temb_ca_audio_scale_shift": "aud",
                    "temb_ca_gate": "vid",
                    "temb_ca_audio_gate": "aud",
                    "video_rotary_emb": "vid:-2",
                    "audio_rotary_emb": "aud:-2",
                    "ca_video_rotary_emb": "vid:-2",
                    "ca_audio_rotary_emb": "aud:-2",
                },
                ("vid", "aud"),
            ),
        ),
        attention={
            "attn1": "vid",
            "audio_attn1": "aud",
            "audio_to_video_attn": ("vid", "aud"),
            "video_to_audio_attn": ("aud", "vid"),
        },
        whole=("aud",),  # some hundred tokens beside tens of thousands
    ),
    "Kandinsky5Transformer3DModel": Row(
        stacks=(StackRow("visual_transformer_blocks", {"visual_embed": "img", "rope": "img"}, ("img",)),),
        attention={"self_attention": "img"},
        refuses={"sparse_params": "its sparse attention compares all tokens before it chooses some"},
    ),
    "LatteTransformer3DModel": Row(
        stacks=(  # in turn, and tokens are rearranged in between
            StackRow(_BLOCKS, {"hidden_states": "img"}, ("img",), is_apart=True),
            StackRow("temporal_transformer_blocks", {"hidden_states": "time"}, ("time",), is_apart=True),
        ),
        attention={f"{_BLOCKS}.attn1": "img", "temporal_transformer_blocks.attn1": "time"},
    ),
    "AllegroTransformer3DModel": Row(
        stacks=(
            StackRow(
                _BLOCKS,
                {"hidden_states": "img", "attention_mask": "img:2", "image_rotary_emb": ("", "img")},
                ("img",),
            ),
        ),
        attention={"attn1": "img"},
    ),
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
                    "latents": "img",
                },
                ("img", "img"),
            ),
        ),
        attention={"attn1": "img"},
        residuals={"block_controlnet_hidden_states": "img"},
    ),
    "MochiTransformer3DModel": Row(
        stacks=(StackRow(_BLOCKS, {**_JOINT, "image_rotary_emb": "img:0"}, _IMG_TXT),),
        attention={"attn1": "img+txt"},
        whole=("txt",),
        ends={"norm_out": "img"},
        masks="absent",
    ),
    "AnyFlowTransformer3DModel": Row(
        stacks=(StackRow("blocks", {"hidden_states": "img", "temb": "img", "rotary_emb": "img:-2"}, ("img",)),),
        attention={"attn1": "img"},
    ),
    "HeliosTransformer3DModel": Row(
        stacks=(
            StackRow(
                "blocks",
                {"hidden_states": "img", "temb": "img:1/4", "rotary_emb": "img", "original_context_length": "img:-1"},
                ("img",),
            ),
        ),
        attention={"attn1": "img"},
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
            r"video_dec_block\.self_attention": "img",
            r"audio_dec_block\.self_attention": "aud",
            "va_cross_attention": ("img", "aud"),
            "av_cross_attention": ("aud", "img"),
        },
        whole=("aud",),  # few tokens beside those of the video
    ),
    "MiniMaxH3Transformer3DModel": Row(
        stacks=(
            StackRow(_BLOCKS, {"hidden_states": "all", "adaln_indices": "all:0", "rotary_emb": "all:0"}, ("all",)),
        ),
        attention={"attn": "all"},
    ),
}

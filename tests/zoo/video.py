"""Videos.

They measure 48 by 80 pixels and nine frames where the pipeline allows it: an odd number of tokens.
The figures are smaller than, and partly after, those of diffusers' own fast tests.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from tests.zoo import autoencoders, encoders, tokenizers
from tests.zoo.entry import entry

PROMPT = "a red fox running by the river"
_VIDEO: dict[str, Any] = {
    "num_inference_steps": 2,
    "height": 48,
    "width": 80,
    "num_frames": 9,
    "output_type": "pt",
}
_WAN: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "blurry",
    "guidance_scale": 4.0,
    "max_sequence_length": 47,
    **_VIDEO,
}
_LTX: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "blurry",
    "guidance_scale": 3.0,
    "max_sequence_length": 47,
    **(_VIDEO | {"height": 32, "width": 96, "num_frames": 5}),
}
_GRADIENT = Image.linear_gradient("L").resize((96, 32)).convert("RGB")


def _wan_transformer(layers: int) -> Any:
    """Returns a Wan transformer of so many layers."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=encoders.WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=64,
    )


def _wan_parts() -> dict[str, Any]:
    """Returns the parts of the pipelines of the Wan family, but for the transformers."""
    t5 = tokenizers.t5()
    return {
        "vae": autoencoders.wan(),
        "text_encoder": encoders.umt5(t5),
        "tokenizer": t5,
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _wan21() -> DiffusionPipeline:
    """Returns a Wan 2.1 pipeline, text to video."""
    from diffusers import WanPipeline

    return WanPipeline(transformer=_wan_transformer(layers=5), **_wan_parts())


def _wan22() -> DiffusionPipeline:
    """Returns a Wan 2.2 pipeline: one transformer for the noisy steps, one for the rest."""
    from diffusers import WanPipeline

    return WanPipeline(
        transformer=_wan_transformer(layers=4),
        transformer_2=_wan_transformer(layers=4),
        boundary_ratio=0.875,
        **_wan_parts(),
    )


def _ltx() -> DiffusionPipeline:
    """Returns an LTX-Video pipeline, text to video."""
    from diffusers import LTXPipeline

    return LTXPipeline(**_ltx_parts())


def _ltx_i2v() -> DiffusionPipeline:
    """Returns an LTX-Video pipeline that starts from a picture; each token has a noise level of its own."""
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**_ltx_parts())


def _ltx_parts() -> dict[str, Any]:
    """Returns the parts of the pipelines of the LTX family."""
    from diffusers import LTXVideoTransformer3DModel

    t5 = tokenizers.t5()
    return {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=5,
            caption_channels=encoders.WIDTH,
        ),
        "vae": autoencoders.ltx(),
        "text_encoder": encoders.t5(t5),
        "tokenizer": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _hunyuan_video15() -> DiffusionPipeline:
    """Returns a HunyuanVideo 1.5 pipeline; its guider makes two calls per step."""
    from diffusers import ClassifierFreeGuidance, HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel

    qwen, byt5 = tokenizers.qwen2(), tokenizers.byt5()
    return HunyuanVideo15Pipeline(
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            text_embed_dim=encoders.WIDTH,
            text_embed_2_dim=encoders.WIDTH,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=64,
            task_type="t2v",
        ),
        vae=autoencoders.hunyuan_video15(),
        text_encoder=encoders.qwen25_vl_text(qwen),
        tokenizer=qwen,
        text_encoder_2=encoders.t5(byt5),
        tokenizer_2=byt5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )


def _cogvideox() -> DiffusionPipeline:
    """Returns a CogVideoX pipeline of the first kind: positions from a table, no rotation."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    t5 = tokenizers.t5()
    return CogVideoXPipeline(
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=encoders.WIDTH,
            num_layers=4,
            sample_width=10,
            sample_height=6,
            sample_frames=9,
        ),
        vae=autoencoders.cogvideox(),
        text_encoder=encoders.t5(t5),
        tokenizer=t5,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


ENTRIES = (
    entry(
        "wan21",
        _wan21,
        "video",
        "3 heads; float32 islands in bfloat16 (modulation, time embedding); 45 tokens; two calls per step",
        **_WAN,
    ),
    entry(
        "wan22",
        _wan22,
        "video",
        "two denoisers, one step each; 3 heads; float32 islands in bfloat16; two calls per step",
        **_WAN,
    ),
    entry(
        "ltx",
        _ltx,
        "video",
        "a parameter on the model itself; a text mask; guided in one batch; T5's table is tied",
        **_LTX,
    ),
    entry(
        "ltx_i2v",
        _ltx_i2v,
        "video",
        "takes a picture; a noise level for each token; has the very weights of ltx",
        seed="ltx",
        image=_GRADIENT,
        **_LTX,
    ),
    entry(
        "hunyuan_video15",
        _hunyuan_video15,
        "video",
        "3 heads; 2000 text tokens, nearly all masked; quoted words read by bytes; guided by a component",
        prompt=PROMPT + ', with the word "moon"',
        negative_prompt="blurry",
        **(_VIDEO | {"height": 20, "width": 28}),
    ),
    entry(
        "cogvideox",
        _cogvideox,
        "video",
        "3 heads; 226 + 45 tokens; an unsaved buffer of positions; guided in one batch",
        prompt=PROMPT,
        negative_prompt="blurry",
        guidance_scale=4.0,
        **_VIDEO,
    ),
)

"""Pictures from U-Nets: blocks in two paths with skip connections, of different classes and shapes."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel

from tests.zoo import autoencoders, encoders, tokenizers
from tests.zoo.entry import entry

_CALL: dict[str, Any] = {
    "prompt": "a red fox under the moon",
    "negative_prompt": "blurry",
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "output_type": "pt",
}


def _unet(text: int, **extra: Any) -> UNet2DConditionModel:
    """Returns a U-Net of two levels that reads text of the given width."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=text,
        **extra,
    )


def _sdxl() -> DiffusionPipeline:
    """Returns a Stable Diffusion XL pipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    clip = tokenizers.clip()
    sizes = 8
    return StableDiffusionXLPipeline(
        unet=_unet(
            text=2 * encoders.WIDTH,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=sizes,
            projection_class_embeddings_input_dim=encoders.WIDTH + 6 * sizes,
        ),
        vae=autoencoders.kl(shift=None),
        text_encoder=encoders.clip(clip),
        tokenizer=clip,
        text_encoder_2=encoders.clip(clip, projected=True, activation="gelu"),
        tokenizer_2=tokenizers.clip(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd15() -> DiffusionPipeline:
    """Returns a Stable Diffusion 1.5 pipeline without a safety checker."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    clip = tokenizers.clip()
    return StableDiffusionPipeline(
        unet=_unet(text=encoders.WIDTH, attention_head_dim=2),
        vae=autoencoders.kl(shift=None),
        text_encoder=encoders.clip(clip),
        tokenizer=clip,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


ENTRIES = (
    entry(
        "sdxl",
        _sdxl,
        "image",
        "a U-Net: blocks of different classes and shapes, skip connections; guided in one batch",
        height=40,
        width=56,
        **_CALL,
    ),
    entry("sd15", _sd15, "image", "a U-Net; convolutions around attention", height=32, width=48, **_CALL),
)

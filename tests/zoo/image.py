"""Pictures from transformers.

Pictures measure 40 by 56 pixels where the pipeline allows it: 5 by 7 patches, 35 tokens, an odd number.
The figures are smaller than, and partly after, those of diffusers' own fast tests.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from tests.zoo import autoencoders, encoders, tokenizers
from tests.zoo.entry import entry

PROMPT = "a red fox under the moon"
_PICTURE: dict[str, Any] = {"num_inference_steps": 2, "height": 40, "width": 56, "output_type": "pt"}
_GRADIENT = Image.radial_gradient("L").resize((56, 40)).convert("RGB")


def _flux_parts() -> dict[str, Any]:
    """Returns the parts of the pipelines of the Flux 1 family."""
    from diffusers import FluxTransformer2DModel

    clip, t5 = tokenizers.clip(), tokenizers.t5()
    return {
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=encoders.WIDTH,
            pooled_projection_dim=encoders.WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": autoencoders.kl(),
        "text_encoder": encoders.clip(clip),
        "tokenizer": clip,
        "text_encoder_2": encoders.t5(t5),
        "tokenizer_2": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _flux() -> DiffusionPipeline:
    """Returns a Flux pipeline."""
    from diffusers import FluxPipeline

    return FluxPipeline(**_flux_parts())


def _flux_img2img() -> DiffusionPipeline:
    """Returns a Flux pipeline that starts from a picture."""
    from diffusers import FluxImg2ImgPipeline

    return FluxImg2ImgPipeline(**_flux_parts())


def _flux2_transformer(text: int, guidance: bool) -> Any:
    """Returns a Flux 2 transformer that reads text of the given width."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=text,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def _flux2() -> DiffusionPipeline:
    """Returns a Flux 2 pipeline."""
    from diffusers import Flux2Pipeline

    tokenizer = tokenizers.mistral()
    return Flux2Pipeline(
        transformer=_flux2_transformer(text=3 * 16, guidance=True),
        vae=autoencoders.flux2(),
        text_encoder=encoders.mistral3(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _flux2_klein() -> DiffusionPipeline:
    """Returns a Flux 2 Klein pipeline with guidance."""
    from diffusers import Flux2KleinPipeline

    tokenizer = tokenizers.qwen2()
    return Flux2KleinPipeline(
        transformer=_flux2_transformer(text=3 * 16, guidance=False),
        vae=autoencoders.flux2(),
        text_encoder=encoders.qwen3(tokenizer, layers=28, width=16),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _qwen_image() -> DiffusionPipeline:
    """Returns a Qwen-Image pipeline."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = tokenizers.qwen2()
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=5,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=encoders.WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=autoencoders.qwen_image(),
        text_encoder=encoders.qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _z_image() -> DiffusionPipeline:
    """Returns a Z-Image pipeline."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = tokenizers.qwen2()
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=48,
            n_layers=5,
            n_refiner_layers=2,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=encoders.WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[600, 32, 32],
        ),
        vae=autoencoders.kl(),
        text_encoder=encoders.qwen3(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _sd3() -> DiffusionPipeline:
    """Returns a Stable Diffusion 3 pipeline with its three text encoders."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = tokenizers.clip(), tokenizers.t5()
    text = 2 * encoders.WIDTH
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=text,
            caption_projection_dim=64,
            pooled_projection_dim=text,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=autoencoders.kl(),
        text_encoder=encoders.clip(clip, projected=True),
        tokenizer=clip,
        text_encoder_2=encoders.clip(clip, projected=True, activation="gelu"),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=encoders.t5(t5, width=text),
        tokenizer_3=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _sana() -> DiffusionPipeline:
    """Returns a Sana pipeline: linear attention and a deep-compression autoencoder."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = tokenizers.gemma()
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=4,
            num_cross_attention_heads=3,
            cross_attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=encoders.WIDTH,
            sample_size=16,
        ),
        vae=autoencoders.deep_compression(),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _chroma() -> DiffusionPipeline:
    """Returns a Chroma pipeline: Flux's blocks, their modulation made by one approximator."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    tokenizer = tokenizers.t5()
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=encoders.WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        vae=autoencoders.kl(),
        text_encoder=encoders.t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _lumina2() -> DiffusionPipeline:
    """Returns a Lumina 2 pipeline; its vae factor is fixed at 8 in the pipeline."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = tokenizers.gemma()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=64,
            num_layers=4,
            num_refiner_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 16, 16),
            cap_feat_dim=encoders.WIDTH,
        ),
        vae=autoencoders.kl(levels=4),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


ENTRIES = (
    entry(
        "flux",
        _flux,
        "image",
        "3 heads; 35 picture and 47 text tokens; two stacks; T5's embedding table is tied",
        prompt=PROMPT,
        guidance_scale=3.5,
        max_sequence_length=47,
        **_PICTURE,
    ),
    entry(
        "flux_img2img",
        _flux_img2img,
        "image",
        "takes a picture, so that two of its four steps are left; has the very weights of flux",
        seed="flux",
        prompt=PROMPT,
        image=_GRADIENT,
        strength=0.5,
        guidance_scale=3.5,
        max_sequence_length=47,
        **(_PICTURE | {"num_inference_steps": 4}),
    ),
    entry(
        "flux2",
        _flux2,
        "image",
        "3 heads; modulation shared by all blocks; 30 layers of text encoder; an integer buffer",
        prompt=PROMPT,
        max_sequence_length=127,
        **_PICTURE,
    ),
    entry(
        "flux2_klein",
        _flux2_klein,
        "image",
        "3 heads; guided by two calls per step; text encoder of 28 layers with a tied head",
        prompt=PROMPT,
        guidance_scale=4.0,
        max_sequence_length=63,
        **_PICTURE,
    ),
    entry(
        "qwen_image",
        _qwen_image,
        "image",
        "two prompts of different lengths in one batch, so a padding mask; guided by two calls per step",
        prompt=[PROMPT, "a large white house, a small boat and a bird over the river, in the rain"],
        negative_prompt=["blurry", "low quality and blurry"],
        true_cfg_scale=4.0,
        **(_PICTURE | {"height": 48, "width": 80}),
    ),
    entry(
        "z_image",
        _z_image,
        "image",
        "3 heads; lists of tensors as inputs; three stacks; sequences padded to multiples of 32",
        prompt=PROMPT,
        guidance_scale=4.0,
        max_sequence_length=63,
        **_PICTURE,
    ),
    entry(
        "sd3",
        _sd3,
        "image",
        "three text encoders; a saved buffer of positions; one block of another shape; T5's table is tied",
        prompt=PROMPT,
        negative_prompt="blurry",
        guidance_scale=5.0,
        max_sequence_length=31,
        **_PICTURE,
    ),
    entry(
        "sana",
        _sana,
        "image",
        "3 heads; linear attention; a parameter on the model itself; guided in one batch",
        prompt=PROMPT,
        guidance_scale=4.5,
        max_sequence_length=31,
        use_resolution_binning=False,
        complex_human_instruction=None,
        **(_PICTURE | {"height": 32, "width": 64}),
    ),
    entry(
        "chroma",
        _chroma,
        "image",
        "modulation from one approximator with an unsaved buffer; a text mask; guided by two calls per step",
        prompt=PROMPT,
        negative_prompt="blurry",
        guidance_scale=4.0,
        max_sequence_length=47,
        **_PICTURE,
    ),
    entry(
        "lumina2",
        _lumina2,
        "image",
        "grouped-query attention (4 heads, 2 for keys and values); a text mask; three stacks",
        prompt=PROMPT,
        guidance_scale=4.0,
        max_sequence_length=95,
        **(_PICTURE | {"height": 48, "width": 80}),
    ),
)

"""Sound, alone and with a video."""

from __future__ import annotations

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests.zoo import autoencoders, encoders, tokenizers
from tests.zoo.entry import entry

_RATE = 1600


def _ltx2() -> DiffusionPipeline:
    """Returns an LTX-2 pipeline: two streams in one denoiser, connectors before it, a vocoder behind it."""
    from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    tokenizer = tokenizers.gemma()
    text_encoder = encoders.gemma3(tokenizer)
    width = encoders.WIDTH
    return LTX2Pipeline(
        transformer=LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=3,
            attention_head_dim=16,
            cross_attention_dim=48,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=3,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=24,
            vae_scale_factors=(2, 8, 8),
            audio_sampling_rate=_RATE,
            audio_hop_length=16,
            num_layers=3,
            caption_channels=width,
        ),
        connectors=LTX2TextConnectors(
            caption_channels=width,
            text_proj_in_factor=text_encoder.config.text_config.num_hidden_layers + 1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=width // 4,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=4,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=width // 4,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=4,
            connector_rope_base_seq_len=32,
        ),
        vae=autoencoders.ltx2(),
        audio_vae=autoencoders.ltx2_audio(),
        vocoder=autoencoders.ltx2_vocoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _stable_audio() -> DiffusionPipeline:
    """Returns a Stable Audio pipeline."""
    from diffusers import (
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    t5 = tokenizers.t5()
    width = encoders.WIDTH
    return StableAudioPipeline(
        transformer=StableAudioDiTModel(
            sample_size=62,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=2 * width,
            cross_attention_input_dim=width,
        ),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=width, conditioning_dim=width, min_value=0, max_value=2
        ),
        vae=autoencoders.oobleck(),
        text_encoder=encoders.t5(t5),
        tokenizer=t5,
        scheduler=EDMDPMSolverMultistepScheduler(sigma_data=1.0, sigma_schedule="exponential"),
    )


ENTRIES = (
    entry(
        "ltx2",
        _ltx2,
        "video+audio",
        "two streams in each block; 3 heads; parameters on the model itself; padding on the left; six models",
        prompt="a drum in the rain",
        negative_prompt="quiet",
        num_inference_steps=2,
        height=32,
        width=96,
        num_frames=5,
        guidance_scale=3.0,
        stg_scale=0.0,
        modality_scale=1.0,
        audio_guidance_scale=3.0,
        audio_stg_scale=0.0,
        audio_modality_scale=1.0,
        max_sequence_length=32,
        output_type="pt",
    ),
    entry(
        "stable_audio",
        _stable_audio,
        "audio",
        "grouped-query cross-attention (4 heads, 2 for keys and values); 62 tokens and one for the time",
        prompt="a loud drum in the rain",
        negative_prompt="quiet",
        num_inference_steps=2,
        guidance_scale=4.0,
        audio_end_in_s=0.5,
        output_type="pt",
    ),
)

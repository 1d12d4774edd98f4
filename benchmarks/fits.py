"""What fits: bytes of published models, and the least that each mode of offload needs on the device.

    python benchmarks/fits.py

Arithmetic on the published configurations, in bfloat16: modules are built on the meta device, and no weights exist.
Prints the table of the README, then one line of JSON.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from penstock.bytesize import format_bytes
from penstock.engine.plans import demands_of
from penstock.models.components import discover
from penstock.models.quiet import quiet_libraries
from penstock.offload.units import take_apart
from penstock.plan import Offload
from penstock.planner.solve import least_bytes

XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "is_gated_act": True}
FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def flux() -> dict[str, Any]:
    """FLUX.1 dev and schnell: 19 double and 38 single blocks, T5-XXL, CLIP-L."""
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        "text_encoder_2": T5EncoderModel(T5Config(vocab_size=32128, **XXL)),
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "vae": AutoencoderKL(**FLUX_VAE),
    }


def qwen_image() -> dict[str, Any]:
    """Qwen-Image: 60 blocks, Qwen2.5-VL 7B."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "transformer": QwenImageTransformer2DModel(),
        "vae": AutoencoderKLQwenImage(),
    }


def wan() -> dict[str, Any]:
    """Wan 2.2 T2V A14B: two experts of 40 blocks, UMT5-XXL."""
    return {
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL)),
        "transformer": WanTransformer3DModel(),
        "transformer_2": WanTransformer3DModel(),
        "vae": AutoencoderKLWan(),
    }


MODES: tuple[Offload, ...] = ("sequential", "layerwise")
MODELS = {"FLUX.1": flux, "Qwen-Image": qwen_image, "Wan 2.2 A14B": wan}


def main() -> None:
    """Print the table."""
    rows = {}
    for name, build in MODELS.items():
        with quiet_libraries(), init_empty_weights(include_buffers=True):
            modules = build()
        pipeline = SimpleNamespace(**{key: module.to(torch.bfloat16) for key, module in modules.items()})
        sizes = []
        for mode in MODES:
            partition = take_apart(discover(pipeline).components, lambda *_: None, is_layerwise=mode == "layerwise")
            demands = demands_of(partition, mode, torch.device("cuda"))
            sizes.append(least_bytes(demands, prefetch=1))
        rows[name] = (demands.num_bytes, *sizes)
        print(f"| {name} | {' | '.join(map(format_bytes, rows[name]))} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

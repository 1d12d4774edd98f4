"""Pipelines with ControlNets, which add to the tokens of a denoiser between its blocks.

They stand apart from the zoo's other entries: what is true of all pipelines is tried on those.

    pipe = controlnets.build("flux_two")
    picture, *_ = zoo.tensors(controlnets.run(pipe, "flux_two", seed=3))
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from tests.zoo import autoencoders, image, unet
from tests.zoo.denoisers.case import noise
from tests.zoo.denoisers.rare_image import _hunyuan_dit
from tests.zoo.entry import Entry, entry

_RADIAL = Image.radial_gradient("L").resize((56, 40)).convert("RGB")
_LINEAR = Image.linear_gradient("L").resize((56, 40)).convert("RGB")


def _of(pipe: DiffusionPipeline, *without: str) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name not in without}


def _flux(number: int = 1, heads: int = 3, modes: int | None = None) -> DiffusionPipeline:
    """Returns a Flux pipeline with so many ControlNets; one with modes is a union of several."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel

    parts = _of(image._flux(), "image_encoder", "feature_extractor")
    parts["transformer"] = FluxTransformer2DModel.from_config(parts["transformer"].config, num_attention_heads=heads)
    nets = [
        FluxControlNetModel.from_transformer(
            parts["transformer"],
            num_layers=2 - more,
            num_single_layers=2 + more,
            attention_head_dim=16,
            num_attention_heads=heads,
            load_weights_from_transformer=False,
        )
        for more in range(number)
    ]
    if modes:
        nets = [FluxControlNetModel.from_config(nets[0].config, num_mode=modes)]
    return FluxControlNetPipeline(**parts, controlnet=nets if number > 1 else nets[0])


def _sd3(number: int = 1) -> DiffusionPipeline:
    """Returns a Stable Diffusion 3 pipeline with so many ControlNets."""
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    parts = _of(image._sd3(), "image_encoder", "feature_extractor")
    transformer = parts["transformer"]
    nets = [
        SD3ControlNetModel.from_transformer(
            transformer, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
        )
        for _ in range(number)
    ]
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=nets if number > 1 else nets[0])


def _qwen(is_union: bool = False) -> DiffusionPipeline:
    """Returns a Qwen-Image pipeline with a ControlNet; one that is a union takes several pictures."""
    from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline, QwenImageMultiControlNetModel

    parts = image._qwen_image().components
    net = QwenImageControlNetModel.from_transformer(
        parts["transformer"],
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        load_weights_from_transformer=False,
    )
    return QwenImageControlNetPipeline(**parts, controlnet=QwenImageMultiControlNetModel([net]) if is_union else net)


def _z_image() -> DiffusionPipeline:
    """Returns a Z-Image pipeline, whose ControlNet has the embedders and refiners of the transformer for its own."""
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline

    net = ZImageControlNetModel(
        control_layers_places=[0, 2], control_in_dim=4, dim=48, n_refiner_layers=2, n_heads=3, n_kv_heads=3
    )
    return ZImageControlNetPipeline(**image._z_image().components, controlnet=net)


def _hunyuan() -> DiffusionPipeline:
    """Returns a Hunyuan-DiT pipeline without text encoders."""
    from diffusers import HunyuanDiT2DControlNetModel, HunyuanDiTControlNetPipeline

    transformer = _hunyuan_dit(4)
    return HunyuanDiTControlNetPipeline(
        vae=autoencoders.kl(levels=4, shift=None),  # the pipeline rotates by tokens of 16 pixels
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        controlnet=HunyuanDiT2DControlNetModel.from_transformer(
            transformer, transformer_num_layers=4, load_weights_from_transformer=False
        ),
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    """Returns a Stable Diffusion XL pipeline, whose U-Net cannot be split."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    parts = _of(unet._sdxl(), "image_encoder", "feature_extractor")
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16, 16))
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=net, add_watermarker=False)


def _embeds() -> dict[str, Any]:
    """Returns the two texts of Hunyuan-DiT, with masks, for both halves of guidance."""
    texts: dict[str, Any] = {}
    for ending, tokens, width in (("", 16, 32), ("_2", 8, 16)):
        for kind in ("", "negative_"):
            texts[f"{kind}prompt_embeds{ending}"] = noise(f"{kind}{ending}", 1, tokens, width)
            texts[f"{kind}prompt_attention_mask{ending}"] = torch.ones(1, tokens, dtype=torch.int64)
    return texts


_FLUX = {name: value for name, value in image.ENTRIES[0].call.items() if name != "negative_prompt"}
_ENTRIES = {found.name: found.call for found in image.ENTRIES}
_TWO = {"control_image": [_RADIAL, _LINEAR], "controlnet_conditioning_scale": [0.7, 0.4]}
_ENDS = {"control_guidance_start": 0.4, "control_guidance_end": 1.0}
_QWEN = _RADIAL.resize((80, 48))

ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        found.name: found
        for found in (
            entry(
                "flux_one",
                _flux,
                "image",
                "two pictures; as many residuals as do not divide the blocks; guided by two calls from the second step",
                **{**_ENTRIES["flux"], **_ENDS, "control_image": _RADIAL, "num_images_per_prompt": 2},
            ),
            entry(
                "flux_two", lambda: _flux(2, heads=4), "image", "two of other depths", **{**_ENTRIES["flux"], **_TWO}
            ),
            entry(
                "flux_union",
                lambda: _flux(modes=3),
                "image",
                "a mode is a token of its text",
                **{**_ENTRIES["flux"], "control_image": _RADIAL, "control_mode": 1},
            ),
            entry("sd3_one", _sd3, "image", "guided in one batch", **{**_ENTRIES["sd3"], "control_image": _RADIAL}),
            entry("sd3_two", lambda: _sd3(2), "image", "their sum", **{**_ENTRIES["sd3"], **_TWO}),
            entry("qwen_one", _qwen, "image", "masked texts", **{**_ENTRIES["qwen_image"], "control_image": _QWEN}),
            entry(
                "qwen_union",
                lambda: _qwen(is_union=True),
                "image",
                "two pictures, of which one ends early",
                **{
                    **_ENTRIES["qwen_image"],
                    **_TWO,
                    "control_image": [_QWEN, _LINEAR.resize((80, 48))],
                    "control_guidance_end": [1.0, 0.5],
                },
            ),
            entry(
                "z_image_one",
                _z_image,
                "image",
                "has modules of the transformer for its own",
                **{**_ENTRIES["z_image"], "control_image": _RADIAL},
            ),
            entry(
                "hunyuan_one",
                _hunyuan,
                "image",
                "residuals enter with skips, and their list is emptied",
                control_image=_RADIAL.resize((48, 80)),
                height=80,
                width=48,
                num_inference_steps=2,
                use_resolution_binning=False,
                output_type="pt",
                **_embeds(),
            ),
            entry("sdxl_one", _sdxl, "image", "cannot be split", **{**unet.ENTRIES[0].call, "image": _RADIAL}),
        )
    }
)


def build(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Makes a pipeline; the same name gives the same weights in every call and every process.

    Args:
        name: One of `ENTRIES`.
        dtype: Dtype of the weights.

    Returns:
        The pipeline, on the CPU.
    """
    return ENTRIES[name].build(dtype)


def run(pipe: DiffusionPipeline, name: str, seed: int = 0, **overrides: Any) -> Any:
    """Calls a pipeline with the arguments of its entry.

    Args:
        pipe: A pipeline that was built under this name.
        name: One of `ENTRIES`.
        seed: Seed of the noise.
        **overrides: Arguments in place of, or beside, those of the entry.

    Returns:
        The pipeline's output object.
    """
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)  # pipelines draw what a VAE encodes from the global state
    generator = torch.Generator().manual_seed(seed)
    return pipe(**{**ENTRIES[name].call, "generator": generator, **overrides})

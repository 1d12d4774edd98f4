"""Puts the trained parts together into one `FluxPipeline` folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from draw import SIZE
from grammar import DESCRIPTION, PATTERN
from vocabulary import clip_tokenizer, t5_tokenizer

SHIFT = 2.5
STEPS = 8
LENGTH = 64


def assemble(work: Path, folder: Path) -> None:
    """Save the pipeline in bfloat16, and beside it what a user of it should know.

    Args:
        work: Folder of the trained parts.
        folder: Where the pipeline is saved.
    """
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel.from_pretrained(work / "text_encoder_2"),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel.from_pretrained(work / "transformer"),
    )
    for part in (pipeline.vae, pipeline.transformer):
        part.register_to_config(_name_or_path="")  # a model card names no folder of the machine that trained
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    defaults = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "max_sequence_length": LENGTH}
    knowledge = {"defaults": defaults, "prompts": {"pattern": PATTERN, "description": DESCRIPTION}}
    (folder / "penstock.json").write_text(json.dumps(knowledge, indent=2) + "\n", encoding="utf-8")

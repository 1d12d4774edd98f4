"""Puts the trained parts together into one `LTXPipeline` folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5EncoderModel

from assembly import SHIFT, STEPS
from draw import SIZE
from video.grammar import DESCRIPTION, PATTERN, WORDS
from vocabulary import t5_tokenizer

DEFAULTS = {
    "height": SIZE,
    "width": SIZE,
    "num_frames": 17,
    "frame_rate": 8,
    "num_inference_steps": STEPS,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}


def assemble(work: Path, folder: Path) -> None:
    """Save the pipeline in bfloat16, and beside it what a user of it should know.

    Args:
        work: Folder of the trained parts.
        folder: Where the pipeline is saved.
    """
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=AutoencoderKLLTXVideo.from_pretrained(work / "vae"),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder"),
        tokenizer=t5_tokenizer(WORDS),
        transformer=LTXVideoTransformer3DModel.from_pretrained(work / "transformer"),
    )
    for part in (pipeline.vae, pipeline.transformer):
        part.register_to_config(_name_or_path="")  # a model card names no folder of the machine that trained
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    knowledge = {"defaults": DEFAULTS, "prompts": {"pattern": PATTERN, "description": DESCRIPTION}}
    (folder / "penstock.json").write_text(json.dumps(knowledge, indent=2) + "\n", encoding="utf-8")

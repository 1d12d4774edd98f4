"""What a pipeline is and takes, in plain values: what a server tells its clients, and checks their requests with.

Owns that mapping. Does not know who reads it.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import diffusers
import torch
from pydantic import PydanticInvalidForJsonSchema, PydanticUserError, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError

from penstock import __version__
from penstock.engine.arguments import NOT_SETTABLE
from penstock.engine.build import Prepared
from penstock.engine.checks import FRAME_ARGUMENTS, default_values, needed_pictures
from penstock.engine.values import type_hints, wants_picture
from penstock.models.sizes import call_parameters, frame_multiple, frame_rate, output_kind, size_multiple

_MASKS = ("mask_image", "mask")
_REFERENCES = re.compile(r"Flux2|QwenImageEditPlus|QwenImage21|GlmImage|ZImageOmni|BriaFibo2|BriaFiboEdit")
"""Source: how `__call__` of each reads a list, in diffusers 0.42."""


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a prepared model is and takes; all of it can be written as JSON.

    Returns:
        `model`, `pipeline` (its class), `kind`, `parameters` (name to `type` (JSON Schema), `default`, `is_required`,
        `is_picture`), `accepts_image`, `accepts_mask` (the argument's name, or None), `accepts_several_images`,
        `needs_pictures` (names), `default_width`, `default_height` (None where they follow a picture that is needed),
        `size_multiple`, `frame_multiple`, `default_num_frames`, `default_num_inference_steps`, `default_frame_rate`,
        `frames_argument`, `defaults` (the maker's own), `takes_lora`, `takes_latents`,
        `prompt_grammar` (the prompts that the model knows, in words, or None), `effective` (see `effective`).
    """
    pipeline, notes = prepared.skeleton.pipeline, prepared.notes
    owner = type(pipeline)
    takes, kind = call_parameters(owner), output_kind(owner)
    own = default_values(pipeline, notes.defaults)
    frames = next((name for name in FRAME_ARGUMENTS if name in takes), None)
    return {
        "model": prepared.skeleton.folder.model,
        "pipeline": owner.__name__,
        "kind": kind,
        "parameters": _parameters(owner, notes.defaults),
        "accepts_image": "image" in takes,
        "accepts_mask": next((name for name in _MASKS if name in takes), None),
        "accepts_several_images": "image" in takes and _takes_several(owner),
        "needs_pictures": needed_pictures(owner),
        "default_width": own.width,
        "default_height": own.height,
        "size_multiple": size_multiple(pipeline),
        "frame_multiple": frame_multiple(pipeline) if kind == "video" else 1,
        "frames_argument": frames,
        "default_num_frames": own.num_frames,
        "default_num_inference_steps": own.num_inference_steps,
        "default_frame_rate": frame_rate(pipeline, dict(notes.defaults)) if kind == "video" else None,
        "defaults": dict(notes.defaults),
        "takes_lora": hasattr(pipeline, "load_lora_weights"),
        "takes_latents": "latents" in takes,
        "prompt_grammar": notes.prompts.description if notes.prompts is not None else None,
        "effective": effective(prepared),
    }


def effective(prepared: Prepared) -> dict[str, Any]:
    """The configuration that really took effect, as it is served and written into files."""
    return {
        "model": prepared.skeleton.folder.model,
        "pipeline": type(prepared.skeleton.pipeline).__name__,
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "offload": prepared.plan.offload,
        "promised_bytes": prepared.plan.promised_bytes,
        "split": prepared.parallel.description(),
        "variant": prepared.config.variant,
        "revision": prepared.config.revision,
        "versions": {"penstock": __version__, "diffusers": diffusers.__version__, "torch": str(torch.__version__)},
    }


def _parameters(owner: type, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a request may set, by name."""
    hints = type_hints(owner)
    return {
        name: {
            "type": _schema(hints.get(name, Any)),
            "default": own.get(name, _plain(parameter.default)),
            "is_required": parameter.default is inspect.Parameter.empty,
            "is_picture": wants_picture(hints.get(name)),
        }
        for name, parameter in call_parameters(owner).items()
        if name not in NOT_SETTABLE
    }


def _schema(hint: Any) -> dict[str, Any]:
    """JSON Schema of an annotation; empty where JSON cannot hold it."""
    try:
        return TypeAdapter(hint).json_schema()
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError, TypeError):
        return {}


def _plain(default: Any) -> Any:
    return None if default is inspect.Parameter.empty else json.loads(json.dumps(default, default=repr))


def _takes_several(owner: type) -> bool:
    """Whether several pictures go into one; elsewhere in diffusers a list is one for each of several prompts."""
    if owner.__module__.startswith("diffusers."):
        return _REFERENCES.match(owner.__name__) is not None
    return "list" in str(type_hints(owner).get("image")).lower()

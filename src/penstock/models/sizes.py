"""What a pipeline's `__call__` takes and makes, read from its signature and configs before it runs.

Owns the facts about arguments, picture sizes, frame rates and kinds of output. Does not run anything.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

from diffusers.utils.outputs import BaseOutput

from penstock.request import OutputKind

_PROCESSORS = ("image_processor", "video_processor")
_FACTORS = (
    "vae_scale_factor",
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
)
FRAME_RATE_ARGUMENTS = ("frame_rate", "fps")
"""Under which names pipelines take the frame rate, where they take it."""

_TEMPORAL_FACTORS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_OUTPUT_FIELDS: dict[OutputKind, set[str]] = {"video": {"frames"}, "image": {"images"}, "audio": {"audio", "audios"}}
_VIDEO_ARGUMENTS = {"num_frames", "video_length"}
_AUDIO_ARGUMENTS = {"audio_length_in_s", "audio_end_in_s", "audio_duration", "num_waveforms_per_prompt"}
_FRAME_RATES = {
    "CogVideoX": 8,
    "ConsisID": 8,
    "EasyAnimate": 8,
    "Allegro": 15,
    "HunyuanVideo15ImageToVideo": 24,
    "HunyuanVideoFramepack": 30,
    "HunyuanVideo": 15,
    "HunyuanSkyreels": 15,
    "Helios": 24,
    "Kandinsky": 24,
    "LTX": 24,
    "Mochi": 30,
    "Motif": 24,
    "SkyReels": 24,
    "WanAnimate": 30,
    "Wan": 16,
}
"""Frames per second by prefix of the pipeline class; the longest that fits counts.
Source: what the examples in diffusers 0.42's documentation of each pipeline use."""

_DEFAULT_FRAME_RATE = 16.0


def call_parameters(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's `__call__`, without `self`."""
    return dict(_parameters(pipeline_class.__call__))


@functools.lru_cache(64)
def _parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(call).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in parameters if parameter.kind in named}


def call_defaults(pipeline_class: type) -> dict[str, Any]:
    """Argument name to default of `__call__`; what JSON cannot hold is given as text, no default as None."""
    defaults = {}
    for name, parameter in call_parameters(pipeline_class).items():
        value = None if parameter.default is inspect.Parameter.empty else parameter.default
        defaults[name] = json.loads(json.dumps(value, default=repr))
    return defaults


def output_kind(pipeline_class: type) -> OutputKind:
    """What a pipeline makes: by the fields of the output class that its `__call__` names, else by its arguments.

    Sound beside a video counts as video.
    """
    fields = _output_fields(pipeline_class)
    for kind, names in _OUTPUT_FIELDS.items():
        if fields & names:
            return kind
    names = set(call_parameters(pipeline_class))
    return "video" if names & _VIDEO_ARGUMENTS else "audio" if names & _AUDIO_ARGUMENTS else "image"


def _output_fields(pipeline_class: type) -> set[str]:
    call = inspect.unwrap(pipeline_class.__call__)
    named = [getattr(call, "__globals__", {}).get(name) for name in call.__code__.co_names]
    outputs = [value for value in named if isinstance(value, type) and issubclass(value, BaseOutput)]
    return {name for output in outputs for name in getattr(output, "__dataclass_fields__", {})}


def size_multiple(pipeline: Any) -> int:
    """Width and height must be multiples of this many pixels: the VAE's factor times the denoiser's patch.

    Stock pipelines differ in what they do with other sizes: some raise, some round down silently.
    """
    factors = [1]
    for name in _PROCESSORS:
        config = getattr(getattr(pipeline, name, None), "config", None)
        factors.append(int(getattr(config, "vae_scale_factor", 1) or 1))
    latent = max((int(getattr(pipeline, name, 1) or 1) for name in _FACTORS), default=1)
    denoiser = getattr(pipeline, "transformer", None)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", 1) or 1
    if isinstance(patch, (list, tuple)):
        patch = patch[-1]
    return math.lcm(*factors, latent * int(patch))


def frame_multiple(pipeline: Any) -> int:
    """Frames of a video must be one more than a multiple of this: what the VAE packs into one latent frame."""
    return max(int(getattr(pipeline, name, 1) or 1) for name in _TEMPORAL_FACTORS)


def frame_rate(pipeline: Any, arguments: dict[str, Any]) -> float:
    """Frames per second of a video: asked for, else the pipeline's own argument, else what its documentation uses."""
    for name in FRAME_RATE_ARGUMENTS:
        given = arguments.get(name) or call_defaults(type(pipeline)).get(name)
        if given:
            return float(given)
    fitting = [prefix for prefix in _FRAME_RATES if type(pipeline).__name__.startswith(prefix)]
    return float(_FRAME_RATES[max(fitting, key=len)]) if fitting else _DEFAULT_FRAME_RATE

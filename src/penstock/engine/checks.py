"""What a pipeline could not do with its arguments, found before weights load.

Owns the rules about values: counts, sizes, frames, pictures, prompts, options without effect. Each refusal says
what would work. Does not know where an argument came from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from penstock.errors import RequestError
from penstock.models.sizes import call_parameters, frame_multiple, size_multiple
from penstock.request import is_whole

FRAME_ARGUMENTS = ("num_frames", "video_length", "frames")
"""Under which names pipelines take the number of frames."""

_COUNTS = ("width", "height", "num_inference_steps", "max_sequence_length", *FRAME_ARGUMENTS)
_NEEDS_IMAGE = re.compile(r"Img2Img|ImageToVideo|ImageToImage|Inpaint|Pix2Pix|Upscale|FluxFill|I2VGen|Depth2Img")
_INSTEAD_OF_IMAGE = ("image_embeds", "image_latents", "latents")
PACKS_FRAMES = re.compile(r"Wan|LTX|HunyuanVideo(?!Framepack)")  # others pad, trim, or work in windows
_PROMPT = re.compile(r"(negative_)?prompt(_[0-9])?")
_SCHEDULES = ("sigmas", "timesteps")
_BINNING = "use_resolution_binning"
_OWN_RULE = "do_classifier_free_guidance"
_EMPTY = inspect.Parameter.empty


def check_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what this pipeline could not do.

    Args:
        pipeline: the pipeline or its skeleton.
        arguments: all that its `__call__` will be given, but for the generator.

    Raises:
        RequestError: with the numbers, the reason, and what works.
    """
    _check_required(pipeline, arguments)
    _check_counts(arguments)
    _check_prompts(arguments)
    _check_sizes(pipeline, arguments)
    _check_guidance(pipeline, arguments)
    _check_by_the_pipeline(pipeline, arguments)


def effect_notes(pipeline: Any, arguments: Mapping[str, Any]) -> list[str]:
    """What a user should know of arguments that run and change nothing."""
    takes = call_parameters(type(pipeline))
    denoiser = getattr(getattr(pipeline, "transformer", None), "config", None)
    compares = _OWN_RULE in dir(type(pipeline)) or ("negative_prompt" in takes and "true_cfg_scale" not in takes)
    if "guidance_scale" in arguments and getattr(denoiser, "guidance_embeds", None) is False and not compares:
        instead = "; true_cfg_scale does" if "true_cfg_scale" in takes else ""
        return [f"guidance_scale has no effect: this model has no guidance embedding{instead}"]
    return []


def _check_required(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    name = type(pipeline).__name__
    has_picture = any(arguments.get(other) is not None for other in _INSTEAD_OF_IMAGE)
    for argument, parameter in call_parameters(type(pipeline)).items():
        is_needed = argument == "image" and parameter.default is None and _NEEDS_IMAGE.search(name)
        if argument not in arguments and (parameter.default is _EMPTY or (is_needed and not has_picture)):
            raise RequestError(f"{name} needs {argument!r}: give it.", argument)


def _check_counts(arguments: Mapping[str, Any]) -> None:
    for argument in _COUNTS:
        value = arguments.get(argument)
        if value is not None and not is_whole(value, 1):
            raise RequestError(f"{argument}={value!r} is not a whole number from 1 up. Give one.", argument)


def _check_prompts(arguments: Mapping[str, Any]) -> None:
    for argument, value in arguments.items():
        if _PROMPT.fullmatch(argument) and isinstance(value, (list, tuple)):
            raise RequestError(f"{argument} is a list: a request makes one thing. Make one request for each.", argument)


def check_schedule(arguments: Mapping[str, Any]) -> None:
    """Refuse a schedule without steps, and one beside another number of steps.

    Args:
        arguments: those that were given, without the model's defaults.

    Raises:
        RequestError: naming the schedule.
    """
    num_steps = arguments.get("num_inference_steps")
    for name in _SCHEDULES:
        schedule = arguments.get(name)
        if not isinstance(schedule, (list, tuple)):
            continue
        if not schedule:
            raise RequestError(f"{name} is empty: no step would be done. Give one number per step.", name)
        if num_steps is not None and num_steps != len(schedule):
            raise RequestError(
                f"{len(schedule)} {name} mean {len(schedule)} steps, and num_inference_steps={num_steps}. Leave one "
                "of them out.",
                name,
            )


def _check_sizes(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    name, multiple = type(pipeline).__name__, size_multiple(pipeline)
    for side in () if _is_binned(pipeline, arguments) else ("width", "height"):
        pixels = arguments.get(side)
        if pixels is not None and pixels % multiple:
            raise RequestError(
                f"{side}={pixels} is not a multiple of {multiple}, which the VAE and the patches of {name} need. "
                f"Try {_around(pixels, multiple, 0)}.",
                side,
            )
    multiple = frame_multiple(pipeline) if PACKS_FRAMES.match(name) else 1
    for argument in FRAME_ARGUMENTS:
        frames = arguments.get(argument)
        if frames is not None and (frames - 1) % multiple:
            raise RequestError(
                f"{argument}={frames} is not one more than a multiple of {multiple}, the frames that the VAE of {name} "
                f"packs into one. Try {_around(frames - 1, multiple, 1)}.",
                argument,
            )


def _is_binned(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline itself takes the nearest size that it knows, and scales its result back."""
    binning = call_parameters(type(pipeline)).get(_BINNING)
    return bool(arguments.get(_BINNING, binning.default if binning is not None else False))


def _around(value: int, multiple: int, more: int) -> str:
    """The two numbers that would do, one below and one above; the lower one only if it is something."""
    below = value // multiple * multiple + more
    return f"{below} or {below + multiple}" if below > 0 else str(below + multiple)


def _check_guidance(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """A negative prompt counts only where guidance compares two predictions."""
    takes = call_parameters(type(pipeline))
    name = next((name for name in ("true_cfg_scale", "guidance_scale") if name in takes), None)
    if not arguments.get("negative_prompt") or name is None:
        return
    values = {**{key: parameter.default for key, parameter in takes.items()}, **arguments}
    is_on = None if name == "true_cfg_scale" else _own_rule(pipeline, values)
    if is_on is None:
        is_on = not isinstance(values[name], (int, float)) or values[name] > 1
    if not is_on:
        raise RequestError(
            f"negative_prompt has no effect in {type(pipeline).__name__} with {name}={values[name]}: guidance is off. "
            f"Give a higher one, such as --set {name}=4, or leave the negative prompt out.",
            "negative_prompt",
        )


def _own_rule(pipeline: Any, values: Mapping[str, Any]) -> bool | None:
    """What the pipeline's own `do_classifier_free_guidance` says of these values; None where it has none.

    The property reads what `__call__` keeps in underscored attributes, so it is asked of a stand-in that has them.
    """
    rule = getattr(type(pipeline), _OWN_RULE, None)
    if not isinstance(rule, property) or rule.fget is None:
        return None
    kept = {f"_{name}": value for name, value in values.items()}
    unet = getattr(pipeline, "unet", None)
    try:
        return bool(rule.fget(SimpleNamespace(config=pipeline.config, unet=unet, **{**values, **kept})))
    except (AttributeError, TypeError):  # it asks for something that only a running call has
        return None


def _check_by_the_pipeline(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Run the pipeline's own `check_inputs` where its parameters can be filled by name."""
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return
    defaults = {key: parameter.default for key, parameter in call_parameters(type(pipeline)).items()}
    values = {**defaults, **arguments}
    wanted = inspect.signature(check).parameters
    if _is_binned(pipeline, arguments) and {"height", "width"} & set(wanted):
        return  # it is asked of the binned size
    filled = {key: values[key] for key in wanted if values.get(key, _EMPTY) is not _EMPTY}
    if any(key not in filled and parameter.default is _EMPTY for key, parameter in wanted.items()):
        return
    try:
        with torch.no_grad():
            check(**filled)
    except ValueError as error:
        raise RequestError(f"{type(pipeline).__name__}: {str(error).strip()}") from error
    except (TypeError, AttributeError, LookupError, RuntimeError):
        return  # it needs a size or a tensor that its __call__ fills in later: that check comes at the call

"""What a pipeline could not do with its arguments, found before weights load.

Owns the rules about values: counts, sizes, frames, pictures, prompts, options without effect, and what the pipeline
fills in where an argument is left out. Each refusal says what would work. Does not know where an argument came from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from PIL import Image

from penstock.engine.dryrun import dry_run
from penstock.engine.values import type_hints, wants_picture
from penstock.errors import RequestError
from penstock.models.needs import does_without
from penstock.models.sizes import call_parameters, frame_multiple, size_multiple
from penstock.request import is_whole

FRAME_ARGUMENTS = ("num_frames", "video_length", "frames")
"""Under which names pipelines take the number of frames."""

_COUNTS = ("width", "height", "num_inference_steps", "max_sequence_length", *FRAME_ARGUMENTS)
_PICTURE = re.compile(r"(.+_)?(images?|video|frames|(?<!attention_)mask)")
_INSTEAD_OF_PICTURE = ("image_embeds", "image_latents", "masked_image_latents", "latents")
_ENLARGES = {
    "StableDiffusionUpscalePipeline": 4,
    "StableDiffusionLatentUpscalePipeline": 2,
    "LDMSuperResolutionPipeline": 4,
}
"""How much longer the sides of a result are than those of its picture, where no argument says its size.
Source: their documentation in diffusers 0.42."""
_STEPS = "num_inference_steps"
_TRIAL_SIZES = ((64, 64), (128, 192))
PACKS_FRAMES = re.compile(r"Wan|LTX|HunyuanVideo(?!Framepack)")  # others pad, trim, or work in windows
_PROMPT = re.compile(r"(negative_)?prompt(_[0-9])?")
_SCHEDULES = ("sigmas", "timesteps")
_BINNING = "use_resolution_binning"
_OWN_RULE = "do_classifier_free_guidance"
_EMPTY = inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True)
class Effective:
    """What a call makes, with what was left out filled in as the pipeline does; None where only the call itself tells.

    Attributes:
        width: pixels.
        height: pixels.
        num_frames: of a video.
        num_inference_steps: that are asked for; a strength may leave fewer.
    """

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None


def check_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> Effective:
    """Refuse what this pipeline could not do.

    Args:
        pipeline: the pipeline or its skeleton.
        arguments: all that its `__call__` will be given, but for the generator.

    Returns:
        What the call makes.

    Raises:
        RequestError: with the numbers, the reason, and what works.
    """
    _check_required(pipeline, arguments)
    _check_counts(arguments)
    _check_prompts(arguments)
    _check_sizes(pipeline, arguments)
    _check_guidance(pipeline, arguments)
    return _effective(pipeline, arguments, _checked_by_the_pipeline(pipeline, arguments))


def default_values(pipeline: Any, defaults: Mapping[str, Any]) -> Effective:
    """What a pipeline makes where nothing is asked for but a prompt and the pictures that it needs.

    Args:
        pipeline: the pipeline or its skeleton.
        defaults: the model maker's own.

    Returns:
        The size is None where it follows a picture.
    """
    takes = call_parameters(type(pipeline))
    found = []
    for size in _TRIAL_SIZES:
        pictures = dict.fromkeys(needed_pictures(type(pipeline)), Image.new("RGB", size))
        texts = {"prompt": "a"} if "prompt" in takes else {}
        arguments = {**texts, **pictures, **defaults}
        found.append(_effective(pipeline, arguments, dry_run(pipeline, arguments).values))
    first, second = found
    return first if first == second else replace(first, width=None, height=None)


def effect_notes(pipeline: Any, arguments: Mapping[str, Any]) -> list[str]:
    """What a user should know of arguments that run and change nothing."""
    takes = call_parameters(type(pipeline))
    denoiser = getattr(getattr(pipeline, "transformer", None), "config", None)
    compares = _OWN_RULE in dir(type(pipeline)) or ("negative_prompt" in takes and "true_cfg_scale" not in takes)
    if "guidance_scale" in arguments and getattr(denoiser, "guidance_embeds", None) is False and not compares:
        instead = "; true_cfg_scale does" if "true_cfg_scale" in takes else ""
        return [f"guidance_scale has no effect: this model has no guidance embedding{instead}"]
    return []


def needed_pictures(pipeline_class: type) -> list[str]:
    """The pictures, masks and videos without which a pipeline cannot begin."""
    hints = type_hints(pipeline_class)
    return [
        name
        for name, parameter in call_parameters(pipeline_class).items()
        if _is_picture(name, hints)
        and (parameter.default is _EMPTY or (parameter.default is None and not does_without(pipeline_class, name)))
    ]


def _check_required(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    owner: Any = type(pipeline)
    hints = type_hints(owner)
    has_other = any(arguments.get(other) is not None for other in _INSTEAD_OF_PICTURE)
    for argument, parameter in call_parameters(owner).items():
        is_needed = argument not in arguments and parameter.default is _EMPTY
        if not is_needed and not has_other and arguments.get(argument) is None and parameter.default is None:
            is_needed = _is_picture(argument, hints) and not does_without(owner, argument)
        if is_needed:
            raise RequestError(f"{owner.__name__} needs {argument!r}: give it.", argument)


def _is_picture(argument: str, hints: Mapping[str, Any]) -> bool:
    is_other = argument in _INSTEAD_OF_PICTURE or argument.endswith("_latents")
    return not is_other and (_PICTURE.fullmatch(argument) is not None or wants_picture(hints.get(argument)))


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
            f"Give a higher one, such as {name}=4, or leave the negative prompt out.",
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


def _checked_by_the_pipeline(pipeline: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run the pipeline's own checks, on what it fills in itself; the values that it would go on with."""
    run = dry_run(pipeline, arguments)
    name, takes = type(pipeline).__name__, call_parameters(type(pipeline))
    left = run.values.get(_STEPS)
    if isinstance(left, int) and left < 1 and "strength" in takes:
        strength = arguments.get("strength", takes["strength"].default)
        raise RequestError(f"strength={strength} leaves {name} no step to do. Give a higher one.", "strength")
    if run.refusal is not None:
        said = str(run.refusal).strip() or type(run.refusal).__name__
        raise RequestError(f"{name}: {said}", _named_in(said, takes, arguments)) from run.refusal
    return run.values


def _named_in(text: str, takes: Iterable[str], arguments: Mapping[str, Any]) -> str | None:
    """The argument that a pipeline's error is about: one that it quotes, else names; one that was given, if any was."""
    for form in (r"[`'\"]{}[`'\"]", r"(?<![\w.]){}(?!\w)"):
        found = {
            name: match.start() for name in takes if (match := re.search(form.format(re.escape(name)), text, re.I))
        }
        given = [name for name in found if arguments.get(name) is not None]
        if found:
            return min(given or found, key=lambda name: found[name])
    return None


def _effective(pipeline: Any, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> Effective:
    takes = call_parameters(type(pipeline))

    def filled(name: str) -> int | None:
        found = arguments.get(name)
        found = values.get(name) if found is None else found
        return found if name in takes and is_whole(found, 1) else None

    width, height = filled("width"), filled("height")
    size = getattr(arguments.get("image"), "size", None)
    if not {"width", "height"} & takes.keys() and isinstance(size, tuple):
        factor = _ENLARGES.get(type(pipeline).__name__, 1)
        width, height = (factor * side for side in size)
    frames = next((name for name in FRAME_ARGUMENTS if name in takes), "")
    steps = arguments.get(_STEPS) or getattr(takes.get(_STEPS), "default", None)
    return Effective(
        width=width,
        height=height,
        num_frames=filled(frames),
        num_inference_steps=steps if is_whole(steps, 1) else filled(_STEPS),
    )

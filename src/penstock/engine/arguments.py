"""From a request to the arguments of one pipeline's `__call__`, checked before weights load.

Owns the names under which pipelines take what a request asks for. Every value either reaches the pipeline or is
refused with what the pipeline does take; none is dropped. Does not run pipelines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from penstock.config import suggestion
from penstock.engine.checks import FRAME_ARGUMENTS, Effective, check_arguments, check_schedule
from penstock.engine.values import MisfitError, open_picture, read_value, type_hints
from penstock.errors import ModelError, RequestError
from penstock.models.sizes import FRAME_RATE_ARGUMENTS, call_parameters, output_kind
from penstock.request import GenerationRequest

_FIELDS = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "num_frames", "image")
_OTHER_NAMES = {"num_frames": FRAME_ARGUMENTS}
NOT_SETTABLE = {
    "generator": "use seed",
    "output_type": "penstock reads what the pipeline makes",
    "return_dict": "penstock reads the result by name",
    "callback_on_step_end": "progress is reported anyway",
    "callback_on_step_end_tensor_inputs": "progress is reported anyway",
    "callback": "progress is reported anyway",
    "callback_steps": "progress is reported anyway",
    "num_images_per_prompt": "use num_images",
    "num_videos_per_prompt": "use num_images",
    "num_waveforms_per_prompt": "use num_images",
}
"""Arguments of pipelines that penstock fills itself, and what to use instead."""

_SHOWN_ARGUMENTS = 30


def call_arguments(request: GenerationRequest, pipeline: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for one call of a pipeline, without the generator.

    Args:
        request: what is asked for.
        pipeline: the pipeline, or its skeleton: only its class, configs and processors are read.
        defaults: the model maker's own, for what the request leaves open; see `check_defaults`.

    Returns:
        Argument name to value; an input picture is opened, in RGB.

    Raises:
        RequestError: for an argument that the pipeline does not take or a value that it cannot use.
    """
    return checked_arguments(request, pipeline, defaults)[0]


def checked_arguments(
    request: GenerationRequest, pipeline: Any, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], Effective]:
    """The same, and what the call makes where the request leaves something to the pipeline.

    Raises:
        RequestError: likewise.
    """
    takes = call_parameters(type(pipeline))
    given = _fields(request, pipeline, takes)
    hints = type_hints(type(pipeline))
    for argument, value in request.arguments.items():
        if argument in NOT_SETTABLE:
            raise RequestError(f"{argument!r} cannot be set: {NOT_SETTABLE[argument]}.", argument)
        if argument in given:
            raise RequestError(f"{argument!r} is given twice, as an option and as an argument. Keep one.", argument)
        _check_name(argument, pipeline, takes)
        try:
            given[argument] = read_value(value, _hint(argument, hints), opens_files=request.opens_files)
        except MisfitError as error:
            raise RequestError(f"{argument}={error} by {type(pipeline).__name__}.", argument) from error
    if "latents" in given and request.num_images > 1:
        raise RequestError(f"num_images={request.num_images} with latents would make equal pictures. Leave one out.")
    check_schedule(given)
    arguments = {**defaults, **given}
    if getattr(takes.get("output_type"), "default", None) == "latent":
        arguments["output_type"] = "np"  # a few pipelines return latents unless told otherwise
    return arguments, check_arguments(pipeline, arguments)


def check_defaults(defaults: Mapping[str, Any], pipeline_class: type) -> None:
    """Refuse a maker's default arguments that the pipeline does not take.

    Raises:
        ModelError: naming the argument.
    """
    takes, hints = call_parameters(pipeline_class), type_hints(pipeline_class)
    for argument, value in defaults.items():
        if argument not in takes:
            raise ModelError(
                f"penstock.json: {pipeline_class.__name__} takes no {argument!r}{suggestion(argument, list(takes))}. "
                "Correct the model's penstock.json."
            )
        try:
            if not isinstance(value, str):
                read_value(value, hints.get(argument, Any))
            elif read_value(json.dumps(value), hints.get(argument, Any)) != value:
                raise MisfitError(f"{value!r} is text")
        except MisfitError as error:
            raise ModelError(f"penstock.json: {argument}={error}. Correct the model's penstock.json.") from error


def shown_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they stand in metadata: as they are where JSON can hold them, else as a short text."""
    return {name: _shown(value) for name, value in arguments.items()}


def _fields(request: GenerationRequest, pipeline: Any, takes: Mapping[str, object]) -> dict[str, Any]:
    given = {}
    for field in _FIELDS:
        value = getattr(request, field)
        if value is not None:
            name = next((name for name in _OTHER_NAMES.get(field, ()) if name in takes), field)
            _check_name(name, pipeline, takes)
            given[name] = value
    if "image" in given:
        given["image"] = open_picture(given["image"])
    for argument, paths in request.pictures.items():
        _check_name(argument, pipeline, takes)
        if argument in given:
            raise RequestError(f"{argument!r} is given twice. Keep one.", argument)
        pictures = [open_picture(path) for path in paths]
        given[argument] = pictures[0] if len(pictures) == 1 else pictures
    if request.frame_rate is not None:
        kind = output_kind(type(pipeline))
        if kind != "video":
            raise RequestError(f"fps is for videos, and {type(pipeline).__name__} makes {kind}s. Leave it out.", "fps")
        given.update({name: request.frame_rate for name in FRAME_RATE_ARGUMENTS if name in takes})
    return given


def _check_name(argument: str, pipeline: Any, takes: Mapping[str, object]) -> None:
    if argument not in takes:
        name = type(pipeline).__name__
        raise RequestError(f"{name} takes no {argument!r}{suggestion(argument, list(takes))}. {_list(takes)}", argument)


def _hint(argument: str, hints: Mapping[str, Any]) -> Any:
    """An argument's annotation; some pipelines call a frame rate an int, and take fractions."""
    return float if argument in FRAME_RATE_ARGUMENTS else hints.get(argument, Any)


def _list(takes: Mapping[str, object]) -> str:
    names = [name for name in takes if name not in NOT_SETTABLE]
    more = f" and {len(names) - _SHOWN_ARGUMENTS} more" if len(names) > _SHOWN_ARGUMENTS else ""
    return f"It takes {', '.join(names[:_SHOWN_ARGUMENTS])}{more}."


def _shown(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return f"picture {value.width}x{value.height}"
    return json.loads(json.dumps(value, default=repr))

"""From what a client asked to what the engine is given: every field is honoured, or refused by its name.

Owns the meaning of the API's fields and their limits on this server. Values of the pipeline's own arguments are checked
by the pipeline (`Engine.check`). Does not know bodies, files or jobs.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.config import suggestion
from penstock.errors import RequestError
from penstock.request import GenerationRequest
from penstock.server.failures import MOST_NAME, ApiError, invalid
from penstock.server.pipeline import Pipeline, seconds_of
from penstock.server.schemas import ADVICE_ELSEWHERE, MOST_IMAGES, Ask, ImageAsk, VariationAsk, VideoAsk
from penstock.server.settings import ServeConfig
from penstock.wire import Checked, FileFormat, Lora

_SEEDS = 2**32
_STEPS = "num_inference_steps"  # those of a prior or a decoder begin with its name
_SCHEDULES = ("sigmas", "timesteps")  # one step for each entry
_RATES = ("frame_rate",)  # what pipelines call fps
_MOST_ARGUMENTS = 2**20  # bytes of all fields: they travel to ranks and into the record
_MOST_TEXT = 100_000  # characters of one argument of a pipeline
_UNRECORDED = {"model", "user", "safety_identifier", "stream", "detach", "response_format"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a client wants, as the engine and the record of its job need it.

    Attributes:
        request: for the engine.
        format: of the files.
        num_partials: unfinished pictures to make on the way, for each.
        loras: adapters to use.
        size: `WIDTHxHEIGHT`, or auto where the pipeline does not say.
        seconds: of a video, as a text; None otherwise.
        arguments: the fields as they were sent.
    """

    request: GenerationRequest
    format: FileFormat
    num_partials: int
    loras: tuple[Lora, ...]
    size: str
    seconds: str | None
    arguments: dict[str, Any]


def check_model(asked: str | None, names: list[str]) -> None:
    """Refuse another model than this server's.

    Raises:
        ApiError: 404.
    """
    if asked and asked not in names:
        message = (
            f"there is no model {asked[:MOST_NAME]!r} here. This server has {names[0]!r}; leave it out to use that."
        )
        raise ApiError(404, message, code="model_not_found", param="model")


def wanted(ask: Ask, pipeline: Pipeline, settings: ServeConfig, pictures: Mapping[str, tuple[str, ...]]) -> Wanted:
    """Read an ask.

    Args:
        ask: the fields that came.
        pipeline: what will make it.
        settings: limits.
        pictures: argument of the pipeline to paths of the pictures that came for it.

    Raises:
        ApiError: 400 naming a field that cannot be honoured; 413 for more than this server makes.
    """
    num_images = _count(ask, settings)
    width, height = _size(ask, pipeline, settings)
    frames, rate = _frames(ask, pipeline, settings)
    _check_names(ask, pipeline)
    _check_steps(ask, pipeline, settings)
    try:
        request = GenerationRequest(
            prompt=ask.prompt if ask.prompt or pipeline.takes("prompt") else None,
            negative_prompt=ask.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=ask.num_inference_steps,
            num_frames=frames,
            frame_rate=rate,
            num_images=num_images,
            seed=secrets.randbelow(_SEEDS) if ask.seed is None else ask.seed,
            pictures=dict(pictures),
            arguments=dict(ask.model_extra or {}),
            opens_files=False,
        )
    except RequestError as error:
        raise invalid(error.param, str(error)) from None
    arguments = ask.model_dump(exclude_none=True, exclude=_UNRECORDED)
    if len(msgspec.json.encode(arguments)) > _MOST_ARGUMENTS:
        message = f"the fields together are larger than {_MOST_ARGUMENTS} bytes. Send pictures as files, and less else."
        raise ApiError(413, message, code="request_too_large")
    known = pipeline.size(width, height)
    is_video = isinstance(ask, VideoAsk)
    return Wanted(
        request=request,
        format=_format(ask),
        num_partials=_partials(ask),
        loras=_loras(ask, pipeline, settings),
        size=f"{known[0]}x{known[1]}" if all(known) else "auto",
        seconds=seconds_of(frames or pipeline.default_num_frames, rate or pipeline.frame_rate) if is_video else None,
        arguments=arguments,
    )


def within_limits(want: Wanted, checked: Checked, pipeline: Pipeline, settings: ServeConfig) -> Wanted:
    """Hold what a pipeline would really make against the limits: it fills in what a request leaves out.

    Args:
        want: what is wanted, within the limits as far as it says.
        checked: what the pipeline would make of it.
        pipeline: it.
        settings: limits.

    Returns:
        The same, with the real size and duration where they are known.

    Raises:
        ApiError: 413 for more pixels or frames than this server makes, 400 for more steps.
    """
    _check_pixels((checked.width, checked.height), pipeline, settings, "size")
    _check_frames(checked.num_frames, want.request.frame_rate or pipeline.frame_rate, settings, "num_frames")
    if checked.num_inference_steps and checked.num_inference_steps > settings.max_steps:
        raise _too_many_steps(f"{pipeline.name} makes {checked.num_inference_steps} steps of its own", _STEPS, settings)
    changes: dict[str, Any] = {}
    if checked.width and checked.height:
        changes["size"] = f"{checked.width}x{checked.height}"
    if want.seconds is not None and checked.num_frames:
        changes["seconds"] = seconds_of(checked.num_frames, want.request.frame_rate or pipeline.frame_rate)
    return replace(want, **changes)


def _count(ask: Ask, settings: ServeConfig) -> int:
    count = ask.n or 1 if isinstance(ask, ImageAsk) else 1
    most = min(settings.max_images, MOST_IMAGES)
    if count > most:
        raise invalid("n", f"n={str(count)[:MOST_NAME]} is more than this server makes at once. The most is {most}.")
    return count


def _size(ask: Ask, pipeline: Pipeline, settings: ServeConfig) -> tuple[int | None, int | None]:
    width, height = ask.width, ask.height
    if ask.size not in (None, "auto"):
        if width or height:
            raise invalid("size", f"size={ask.size!r} and width or height are both given. Keep one of them.")
        width, height = map(int, str(ask.size).split("x"))
    for name, value in (("width", width), ("height", height)):
        if value is not None and not pipeline.takes(name):
            field = "size" if ask.width is None and ask.height is None else name
            raise invalid(field, f"{pipeline.name} takes no {name}: it makes one size. Leave {field} out.")
    param = "size" if ask.width is None else "width"
    _check_pixels(pipeline.size(width, height), pipeline, settings, param)
    return width, height


def _check_pixels(size: tuple[int | None, int | None], pipeline: Pipeline, settings: ServeConfig, param: str) -> None:
    width, height = size
    if width and height and width * height > settings.most_pixels:
        best = pipeline.largest_size(width, height, settings.most_pixels)
        raise ApiError(
            413,
            f"{width}x{height} is {width * height} pixels, and this server makes at most {settings.most_pixels} "
            f"({settings.max_pixels}). The largest of that shape is {best[0]}x{best[1]}.",
            code="too_large",
            param=param,
        )


def _frames(ask: Ask, pipeline: Pipeline, settings: ServeConfig) -> tuple[int | None, float | None]:
    if not isinstance(ask, VideoAsk):
        return None, None
    frames, rate = ask.num_frames, ask.fps
    if ask.seconds is not None:
        if frames is not None:
            raise invalid("seconds", f"seconds={ask.seconds} and num_frames={frames} are both given. Keep one of them.")
        frames = pipeline.num_frames(float(ask.seconds), rate or pipeline.frame_rate or 1.0)
    param = "num_frames" if ask.seconds is None else "seconds"
    _check_frames(frames or pipeline.default_num_frames, rate or pipeline.frame_rate, settings, param)
    return frames, rate


def _check_frames(frames: int | None, rate: float | None, settings: ServeConfig, param: str) -> None:
    if frames and frames > settings.max_frames:
        best = settings.max_frames / (rate or 1.0)
        raise ApiError(
            413,
            f"{frames} frames are more than this server makes. The most is {settings.max_frames}, or {best:.1f} s.",
            code="too_large",
            param=param,
        )


def _check_steps(ask: Ask, pipeline: Pipeline, settings: ServeConfig) -> None:
    """Refuse more denoising steps than the server does, however they are asked for, or left to the pipeline."""
    given = {"num_inference_steps": ask.num_inference_steps, **(ask.model_extra or {})}
    has_schedule = any(name.endswith(_SCHEDULES) and value for name, value in given.items())
    for name, facts in pipeline.parameters.items():
        is_own = given.get(name) is None
        if is_own and has_schedule:
            continue  # which says how many steps there are
        count = _num_steps(name, facts.get("default") if is_own else given[name])
        if count > settings.max_steps:
            whose = f"{pipeline.name} makes {count} steps of its own" if is_own else f"{name} means {count} steps"
            raise _too_many_steps(whose, name, settings)


def _too_many_steps(whose: str, name: str, settings: ServeConfig) -> ApiError:
    message = f"{whose}, more than this server does. The most is {settings.max_steps}: give {name} accordingly."
    return invalid(name, message)


def _num_steps(name: str, value: Any) -> int:
    """How many steps an argument of a pipeline asks for; 0 where it is about something else."""
    if isinstance(value, str):  # of a form: the pipeline reads it as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return 0
    if name.endswith(_STEPS) and isinstance(value, (int, float)) and math.isfinite(value):
        return int(value)
    return len(value) if name.endswith(_SCHEDULES) and isinstance(value, list) else 0


def _check_names(ask: Ask, pipeline: Pipeline) -> None:
    """Every field reaches the pipeline, or is refused."""
    if ask.prompt is None and pipeline.takes("prompt") and not isinstance(ask, VariationAsk):
        raise invalid("prompt", "prompt is missing. Say what to make.", code="missing_field")
    fields = [name for name in type(ask).model_fields if name not in ("user", "safety_identifier")]
    for name in ("prompt", "negative_prompt", "num_inference_steps"):
        if getattr(ask, name) and not pipeline.takes(name):
            raise invalid(name, pipeline.unknown(name, fields), code="unknown_parameter")
    for name, value in (ask.model_extra or {}).items():
        if name in _RATES and isinstance(ask, VideoAsk):
            raise invalid(name, f"{name} is called fps here. Give that.", code="unknown_parameter")
        if not pipeline.takes(name):
            said = pipeline.unknown(name[:MOST_NAME], fields)
            if name in ADVICE_ELSEWHERE:
                said = f"{name!r} is no field here. {ADVICE_ELSEWHERE[name]}."
            raise invalid(name, said, code="unknown_parameter")
        if name in pipeline.pictures:
            said = "a picture, and comes as a file of the form, or in JSON as a data: URL"
            raise invalid(name, f"{name!r} is {said} where this endpoint takes pictures.")
        if isinstance(value, str) and (len(value) > _MOST_TEXT or "\0" in value):
            raise invalid(
                name, f"{name} is {len(value)} characters, or holds a NUL. Give at most {_MOST_TEXT}, and none."
            )


def _format(ask: Ask) -> FileFormat:
    if not isinstance(ask, ImageAsk):
        return FileFormat()
    name = ask.output_format or "png"
    if ask.output_compression is not None and name == "png":
        if ask.output_compression != 100:
            message = f"output_compression={ask.output_compression} is for jpeg and webp, and png keeps every pixel."
            raise invalid("output_compression", f"{message} Give output_format as well, or leave it out.")
        return FileFormat(name=name)
    return FileFormat(name=name, quality=ask.output_compression)


def _partials(ask: Ask) -> int:
    if not isinstance(ask, ImageAsk) or not ask.partial_images:
        return 0
    if not ask.stream and not ask.detach:
        raise invalid("partial_images", "partial_images come in a stream of events. Give stream=true, or leave it out.")
    return ask.partial_images


def _loras(ask: Ask, pipeline: Pipeline, settings: ServeConfig) -> tuple[Lora, ...]:
    if not ask.lora:
        return ()
    if not pipeline.takes_lora:
        raise invalid("lora", f"{pipeline.name} takes no adapters. Leave lora out.")
    if settings.lora_dir is None:
        raise invalid("lora", "this server was started without --lora-dir, and has no adapters. Leave lora out.")
    paths = _adapters(settings)
    for one in ask.lora:
        if one.name not in paths:
            listed = ", ".join([*paths][:40]) or "none"
            message = f"there is no adapter {one.name!r}{suggestion(one.name, [*paths])}. There is {listed}."
            raise invalid("lora", message)
    return tuple(Lora(name=_plain(one.name), path=str(paths[one.name]), scale=one.scale) for one in ask.lora)


def adapters(settings: ServeConfig) -> list[str]:
    """Names of the adapters that requests may use."""
    return [*_adapters(settings)]


def _adapters(settings: ServeConfig) -> dict[str, Path]:
    """Name of an adapter to its file."""
    if settings.lora_dir is None:
        return {}
    files = Path(settings.lora_dir).expanduser().absolute().glob("*.safetensors")
    return {path.stem: path for path in sorted(files) if path.is_file()}


def _plain(name: str) -> str:
    """An adapter's name as peft takes it: without full stops, and no other adapter's."""
    return name if "." not in name else f"{name.replace('.', '_')}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"

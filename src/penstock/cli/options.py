"""Flags from dataclasses: an option is declared once, where its value is checked.

Owns the flags of a request and the step from a dataclass to Typer's parameters.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

import typer

from penstock.cli.failures import reported
from penstock.config import option
from penstock.errors import RequestError
from penstock.request import GenerationRequest

_SIZE = re.compile(r"(\d+)x(\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The flags of a request, spelt as people type them."""

    negative_prompt: str | None = option(None, "What to avoid, where the pipeline takes it.", "TEXT")
    size: str | None = option(None, "Size in pixels, such as 1024x768.", "WIDTHxHEIGHT")
    steps: int | None = option(None, "Denoising steps.", "N")
    num_frames: int | None = option(None, "Frames of a video.", "N")
    fps: float | None = option(None, "Frames per second of a video; given to the pipeline where it takes it.", "N")
    num_images: int = option(1, "How many to make; number i has seed SEED + i.", "N")
    seed: int | None = option(None, "Of the first one; drawn where it is left out.", "SEED")
    image: str | None = option(None, "Input picture, where the pipeline takes one.", "FILE")
    set: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Any further argument of the pipeline, such as guidance_scale=3.5.",
            "metavar": "NAME=VALUE",
        },
    )

    def request(self, prompt: str | None) -> GenerationRequest:
        """The request that these flags ask for.

        Raises:
            RequestError: for a size or a setting that cannot be read.
        """
        width, height = _size(self.size)
        return GenerationRequest(
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self.steps,
            num_frames=self.num_frames,
            frame_rate=self.fps,
            num_images=self.num_images,
            seed=self.seed,
            image=self.image,
            arguments=_settings(self.set),
        )


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise RequestError(f"--size {text!r} is not WIDTHxHEIGHT. Try --size 1024x768.")
    return int(match[1]), int(match[2])


def _settings(texts: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RequestError(f"--set {text!r} is not NAME=VALUE. Try --set guidance_scale=3.5.")
        if name in settings:
            raise RequestError(f"--set {name}=... is given twice. Keep one.")
        settings[name] = value
    return settings


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function of dataclasses into one of their fields, which Typer can read; adds `--debug`.

    A parameter annotated with a dataclass becomes one flag per field; the others stay as they are. What the
    function raises is reported as `reported` says.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        parameters.extend(_parameters(group))
    parameters.append(_parameter("debug", bool, False, "Show the whole traceback of an error."))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with reported(values.pop("debug")):
            for name, group in groups.items():
                values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
            function(**values)

    run.__signature__ = inspect.Signature(sorted(parameters, key=_is_flag))  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group)
    fresh = group()  # its values are the defaults, those of factories included
    return [
        _parameter(
            item.name, hints[item.name], getattr(fresh, item.name), item.metadata["help"], item.metadata["metavar"]
        )
        for item in fields(group)
    ]


def _parameter(name: str, hint: Any, default: Any, help_text: str, metavar: str | None = None) -> inspect.Parameter:
    flag = typer.Option("--" + name.replace("_", "-"), help=help_text, metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, flag])


def _is_flag(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY

"""A value for one argument of a pipeline, read as the pipeline's own annotation wants it.

Owns the reading of text (`--set name=text`): JSON, plain text, or `@FILE` for a picture, whichever the annotation
accepts first, strictly: "3.5" in quotes is no number, and NaN is none either. Does not know names or pipelines.
"""

from __future__ import annotations

import functools
import inspect
import json
import operator
import struct
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from penstock.errors import RequestError

FILE_MARK = "@"  # mask_image=@mask.png: the picture in that file, where the pipeline wants one

_UNREADABLE = (  # what Pillow raises for broken files, those with a broken EXIF block included
    *(UnidentifiedImageError, OSError, Image.DecompressionBombError),
    *(SyntaxError, ValueError, TypeError, struct.error, EOFError),
)
_CONFIG = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


class MisfitError(ValueError):
    """A value does not fit an annotation; the text says what would."""


def type_hints(pipeline_class: type) -> dict[str, Any]:
    """The annotations of a pipeline's `__call__`; those that cannot be resolved are left out with all others."""
    return dict(_hints(inspect.unwrap(pipeline_class.__call__)))


@functools.lru_cache(64)
def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(call)
    except (NameError, TypeError):  # a hint that names something imported for type checkers only
        return {}


def wants_picture(hint: Any) -> bool:
    """Whether an annotation takes a picture, on its own or in a list."""
    return hint is Image.Image or any(map(wants_picture, typing.get_args(hint)))


def read_value(value: Any, hint: Any, *, opens_files: bool = True) -> Any:
    """The value that a text stands for, or the value itself where it is no text, checked against an annotation.

    Args:
        value: what was given.
        hint: the annotation.
        opens_files: whether `@FILE` stands for a picture.

    Raises:
        MisfitError: where nothing that the text could mean fits.
        RequestError: for a `@FILE` that is no picture.
    """
    adapter = _adapter(hint)
    if value is None or adapter is None:
        return value
    if not opens_files and wants_picture(hint):
        raise MisfitError(f"a {type(value).__name__} does not fit: a picture is wanted")
    for reading in _readings(value, adapter, opens_files):
        try:
            return reading()
        except ValidationError:
            continue
    wanted = "true or false" if hint is bool else hint.__name__ if isinstance(hint, type) else str(hint)
    raise MisfitError(f"{value!r} does not fit: {wanted} is wanted")


def _readings(value: Any, adapter: TypeAdapter[Any], opens_files: bool) -> Iterator[Callable[[], Any]]:
    """What a value could mean, the likeliest first."""
    if not isinstance(value, str):
        yield lambda: adapter.validate_python(value, strict=True)
        with suppress(TypeError, ValueError):  # arrays and tuples where a list is annotated, and the reverse
            text = json.dumps(value, default=_as_list, allow_nan=False)
            yield lambda: adapter.validate_json(text, strict=True)
        return
    yield lambda: adapter.validate_json(value, strict=True)
    yield lambda: adapter.validate_python(value, strict=True)
    if opens_files and value.startswith(FILE_MARK):
        yield lambda: adapter.validate_python(open_picture(value.removeprefix(FILE_MARK)), strict=True)


def open_picture(path: str) -> Image.Image:
    """A picture file in RGB, turned as its camera says; what is transparent becomes white.

    Raises:
        RequestError: for a file that is not there or no picture.
    """
    try:
        with Image.open(Path(path).expanduser()) as file:
            picture = ImageOps.exif_transpose(file)
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise RequestError(f"image {path!r} does not exist. Give the path of a picture.") from None
    except _UNREADABLE as error:
        raise RequestError(f"image {path!r} cannot be read as a picture: {str(error).rstrip('.')}.") from error


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(_corrected(hint), config=_CONFIG)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return None


def _corrected(hint: Any) -> Any:
    """diffusers annotates tuples of any length as `tuple[int]`, which means exactly one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(arguments) == 1:
        return tuple.__class_getitem__((arguments[0], ...))
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, map(_corrected, arguments))
    return hint


def _as_list(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's; json asks for what it does not know."""
    if type(value).__module__ != "numpy":
        raise TypeError(f"{type(value).__name__} is no JSON")
    return value.tolist()

"""The body of a request, as JSON or as a form, read whole or refused.

Owns the reading: which content types there are, what is malformed or cut off, one value per field. Values of a form are
texts. Does not know which fields there are, or what is in a file.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from penstock.server.failures import ApiError, from_validation, invalid
from penstock.server.schemas import ADVICE
from penstock.server.threads import CODING

M = TypeVar("M", bound=BaseModel)

FORM = "multipart/form-data"
JSON = "application/json"

_MOST_FIELDS = 200
_DEEPEST = 32
_MOST_FILES = 32
_MOST_FIELD_BYTES = 2**20
_LARGE_JSON_BYTES = 2**18  # decoded in a thread from here on; looking for equal names would stop all others for long


@dataclass(frozen=True, kw_only=True)
class Body:
    """What came.

    Attributes:
        values: field to value; texts in a form.
        files: field to the files that came under its name.
        is_form: whether it was a form.
    """

    values: dict[str, Any]
    files: dict[str, list[UploadFile]] = field(default_factory=dict)
    is_form: bool = False

    def fields(self, model: type[M]) -> M:
        """The values as a schema has them: of exactly its types in JSON, as texts stand for them in a form.

        Raises:
            ApiError: 400 naming the first field at fault.
        """
        values = {name: value for name, value in self.values.items() if value is not None}
        try:
            return model.model_validate(values, strict=not self.is_form)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False, include_context=False), ADVICE) from None

    def take(self, *names: str) -> Any:
        """Take a value out, by whichever of its names it came; None where it did not."""
        found = [self.values.pop(name) for name in names if name in self.values]
        return found[0] if found else None


@asynccontextmanager
async def reading(request: Request, *types: str) -> AsyncIterator[Body]:
    """The body of a request; its files are closed when the block ends.

    Args:
        request: as it came.
        types: `JSON`, `FORM` or both.

    Raises:
        ApiError: 400 for a malformed body, 415 for another type.
    """
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == FORM and FORM in types:
        form = await _form(request)
        try:
            yield _of_form(form)
        finally:
            await form.close()
        return
    if JSON in types and (kind == JSON or (not kind and FORM not in types)):
        yield Body(values=await _json(request))
        return
    raise ApiError(415, f"the body is {kind[:80] or 'of no type'!r}. Send {' or '.join(types)}.", param="content-type")


async def _json(request: Request) -> dict[str, Any]:
    data = await request.body()
    try:
        if len(data) > _LARGE_JSON_BYTES:
            values = await CODING.run(msgspec.json.decode, data)
        else:
            values = msgspec.json.decode(data)
            json.loads(data, object_pairs_hook=_require_once, parse_int=str)  # of equal names msgspec keeps the last
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(None, f"the body is no JSON: {error}. Send an object of fields.", code="malformed_body") from None
    if _is_deeper(values, _DEEPEST):
        raise invalid(
            None, f"the body is JSON within JSON, more than {_DEEPEST} deep. Send less.", code="malformed_body"
        )
    if not isinstance(values, dict):
        raise invalid(None, "the body is JSON, and no object. Send an object of fields.", code="malformed_body")
    return values


def _require_once(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise invalid(name, f"{name} is given twice. Keep one.")
        seen.add(name)


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects lie within each other more than so deep; what reads them calls itself at each."""
    level = [value]
    for _ in range(most):
        level = [one for item in level for one in _inside(item)]
    return bool(level)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


class _Parser(MultiPartParser):
    """Refuses a form whose last boundary is missing: one that was cut off is not a shorter form."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], **limits: int) -> None:
        super().__init__(headers, self._to_its_end(stream), **limits)
        self._has_ended = False

    async def _to_its_end(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._has_ended:
            raise MultiPartException("it ends before its last boundary")

    def on_end(self) -> None:
        """The last boundary was read."""
        self._has_ended = True


async def _form(request: Request) -> FormData:
    async with aclosing(request.stream()) as stream:
        limits = {"max_files": _MOST_FILES, "max_fields": _MOST_FIELDS, "max_part_size": _MOST_FIELD_BYTES}
        try:
            return await _Parser(request.headers, stream, **limits).parse()
        except MultiPartException as error:
            message = f"the form cannot be read: {error.message.rstrip('.')}. Send it again, whole."
            raise invalid(None, message, code="malformed_body") from None


def _of_form(form: FormData) -> Body:
    values: dict[str, Any] = {}
    files: dict[str, list[UploadFile]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(value)
        elif name in values:
            raise invalid(name, f"{name} is given twice. Keep one.")
        else:
            values[name] = value
    return Body(values=values, files=files, is_form=True)

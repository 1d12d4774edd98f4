"""The OpenAPI document: complete enough to write a client from, and true of the pipeline that is served.

Owns what FastAPI cannot know: bodies that are JSON or a form, the pipeline's own arguments, the error envelope, keys.
Does not know how a route works.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from penstock import __version__
from penstock.server.schemas import EditAsk, ErrorEnvelope, ImageAsk, RemixAsk, VariationAsk, VideoAsk

if TYPE_CHECKING:
    from penstock.server.service import Service
    from penstock.server.settings import ServeConfig

_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}
JOB_ID: dict[str, Any] = {"x-penstock-job-id": {"schema": {"type": "string"}, "description": "Its job."}}

_REFERENCE = "#/components/schemas/{model}"
_FILE = {"type": "string", "format": "binary"}
_PICTURE: dict[str, Any] = {
    "description": "A picture as a data: URL, or a URL of a host that the server allows.",
    "anyOf": [
        {"type": "string", "pattern": "^(data|https?):"},
        {
            "type": "object",
            "properties": {"image_url": {"type": "string", "pattern": "^(data|https?):"}},
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ],
}
_WORDS = {
    400: "A field is wrong, unknown, or not for this pipeline; `param` names it.",
    401: "No key, or a wrong one.",
    403: "A page of another site asks a server without keys.",
    404: "No such model, job or file.",
    405: "Not a method of this route.",
    408: "The body stopped half-way.",
    409: "The job is not in the state for this.",
    413: "More than this server takes or makes; the message names the most.",
    415: "The body is of another type.",
    416: "The file has no such range.",
    421: "The server was asked by a name that is not its own.",
    429: "Too many wait; Retry-After says when to ask again.",
    500: "It failed; the log says more.",
    501: "No pipeline can do this.",
    503: "Not ready, stopping, or ranks died: Retry-After says when to ask again.",
    507: "Out of memory.",
}
_BODIES: dict[str, tuple[type[BaseModel], tuple[str, ...], str | None]] = {
    "/v1/images/generations": (ImageAsk, (), None),
    "/v1/images/edits": (EditAsk, ("image", "mask"), "image"),
    "/v1/images/variations": (VariationAsk, ("image",), "image"),
    "/v1/videos": (VideoAsk, ("input_reference",), None),
    "/v1/videos/sync": (VideoAsk, ("input_reference",), None),
    "/v1/videos/edits": (VideoAsk, ("video",), "video"),
    "/v1/videos/{video_id}/remix": (RemixAsk, (), None),
}
"""Route: the fields of its body, those that are files, and the one of these that must be there."""
_OPEN = ("/live", "/health", "/ready", "/v1/files/{name}")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that are no success."""
    return {status: {"model": ErrorEnvelope, "description": _WORDS[status]} for status in statuses}


def binary(*types: str) -> dict[str, Any]:
    """The content of an answer that is a file."""
    return {one: {"schema": {"type": "string", "format": "binary"}} for one in types}


def install(app: FastAPI, service: Service) -> None:
    """Let an app write its document; that of the pipeline is in it once the pipeline is known."""
    written: dict[bool, dict[str, Any]] = {}

    def document() -> dict[str, Any]:
        description = service.engine.description
        if (description is not None) not in written:
            written[description is not None] = _document(app, service, description)
        return written[description is not None]

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, service: Service, description: dict[str, Any] | None) -> dict[str, Any]:
    document = get_openapi(
        title="penstock",
        version=__version__,
        summary="The OpenAI image and video API in front of a diffusers pipeline.",
        routes=app.routes,
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    asks = {model for model, _, _ in _BODIES.values()}
    _, made = models_json_schema([(ask, "validation") for ask in asks], ref_template=_REFERENCE)
    schemas.update(made["$defs"])
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    for ask in asks - {RemixAsk}:
        _describe(schemas[ask.__name__], description, wants_prompt=ask is not VariationAsk)
        _limit(schemas[ask.__name__]["properties"], service.settings, description or {})
    for path, (ask, files, required) in _BODIES.items():
        document["paths"][path]["post"]["requestBody"] = _body(schemas, ask, files, required, description)
    if description is not None:
        document["paths"] = {path: one for path, one in document["paths"].items() if _can(path, description)}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            _secure(operation, path, bool(service.settings.api_key))
    if service.settings.api_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _secure(operation: dict[str, Any], path: str, has_keys: bool) -> None:
    """What the guard answers before any route does."""
    more = (403, 421) if not has_keys else () if path in _OPEN else (401,)
    for status in more:
        content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorEnvelope")}}}
        operation["responses"][str(status)] = {"description": _WORDS[status], "content": content}
    if has_keys and path not in _OPEN:
        operation["security"] = [{"key": []}]


def _can(path: str, description: dict[str, Any]) -> bool:
    """Whether a route can be used with the pipeline."""
    others = {"/v1/images", "/v1/videos"} - {f"/v1/{description['kind']}s"}
    if path.startswith(tuple(others)):
        return False
    if path.endswith("/variations") and description["parameters"].get("prompt", {}).get("is_required"):
        return False
    return bool(description["accepts_image"]) or not path.endswith(("/edits", "/variations", "/remix"))


def _describe(schema: dict[str, Any], description: dict[str, Any] | None, *, wants_prompt: bool) -> None:
    """Add the pipeline's own arguments; other fields are refused."""
    if description is None:
        return
    schema["additionalProperties"] = False
    takes = description["parameters"]
    for name in ("prompt", "negative_prompt", "num_inference_steps", "width", "height"):
        if name not in takes:
            schema["properties"].pop(name, None)
    if "prompt" in takes and wants_prompt:
        schema.setdefault("required", []).append("prompt")
        prompt = schema["properties"]["prompt"]
        schema["properties"]["prompt"] = {**prompt.pop("anyOf")[0], "description": prompt["description"]}
    for name, facts in takes.items():
        if name not in schema["properties"] and not facts.get("is_picture") and name != "image":
            schema["properties"][name] = {**_or_null(facts["type"]), "description": "Of the pipeline."}


def _limit(properties: dict[str, Any], settings: ServeConfig, description: dict[str, Any]) -> None:
    """Enter what this server takes at most, and the sides that its pipeline can make."""
    most = {"n": settings.max_images, "num_inference_steps": settings.max_steps}
    for name, one in properties.items():
        kinds = [kind for kind in one.get("anyOf", [one]) if kind.get("type") == "integer"]
        for kind in kinds:
            if name in most:
                kind.pop("exclusiveMaximum", None)
                kind["maximum"] = most[name]
            if name in ("width", "height") and description.get("size_multiple"):
                kind["multipleOf"] = description["size_multiple"]


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's annotation, or null for left out; without references to definitions of its own."""
    if not kind or "$defs" in kind:
        return {}
    kinds = copy.deepcopy(kind.get("anyOf", [kind]))
    return {"anyOf": [*(one for one in kinds if one != {"type": "null"}), {"type": "null"}]}


def _body(
    schemas: dict[str, Any],
    ask: type[BaseModel],
    files: tuple[str, ...],
    required: str | None,
    description: dict[str, Any] | None,
) -> dict[str, Any]:
    if ask is RemixAsk:
        schema = {"$ref": _REFERENCE.format(model="RemixAsk")}
        return {"required": True, "content": {"application/json": {"schema": schema}}}
    pictures = _pictures(files, description or {})
    names = list(pictures)
    as_json, as_form = copy.deepcopy(schemas[ask.__name__]), _as_texts(schemas[ask.__name__])
    for name in names:
        as_json["properties"][name] = _video_reference() if name == "video" else _PICTURE
        as_form["properties"][name] = _FILE
    if "image" in names and (description or {}).get("accepts_several_images", True):
        as_json["properties"]["image"] = {"anyOf": [_PICTURE, {"type": "array", "items": _PICTURE}]}
        as_form["properties"]["image[]"] = {"type": "array", "items": _FILE}
    wanted = [name for name, argument in pictures.items() if argument in (description or {}).get("needs_pictures", ())]
    if required is not None and required not in wanted:
        wanted.append(required)
    if wanted:
        as_json["required"] = [*as_json.get("required", ()), *wanted]
        as_form["required"] = [*as_form.get("required", ()), *(name for name in wanted if name != "image")]
    content = {"application/json": {"schema": as_json}, "multipart/form-data": {"schema": as_form}}
    return {"required": True, "content": content}


def _pictures(files: tuple[str, ...], description: dict[str, Any]) -> dict[str, str]:
    """The fields of a body that hold pictures or a video, each once, and the pipeline's arguments that they are for."""
    pictures = [name for name, facts in description.get("parameters", {}).items() if facts.get("is_picture")]
    arguments = {"input_reference": "image", "mask": description.get("accepts_mask") or ""}
    fields = {name: arguments.get(name, name) for name in files}
    if description:
        has_image = bool(description.get("accepts_image"))
        fields = {
            name: one
            for name, one in fields.items()
            if name == "video" or one in pictures or (one == "image" and has_image)
        }
    return {**fields, **{name: name for name in pictures if name not in fields.values()}}


def _as_texts(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without null, which a form has no word for."""
    schema = copy.deepcopy(schema)
    for name, one in schema["properties"].items():
        if "anyOf" in one:
            kept = [kind for kind in one.pop("anyOf") if kind.get("type") != "null"]
            schema["properties"][name] = {**kept[0], **one} if len(kept) == 1 else {"anyOf": kept, **one}
            schema["properties"][name].pop("default", None)
    return schema


def _video_reference() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A finished video of this server.",
        "properties": {"id": {"type": "string"}},
        "required": ["id"],
        "additionalProperties": False,
    }

"""The error envelope: every answer that is no success is `{"error": {message, type, param, code}}`.

Owns which failure is which status, and what a client is told to do about it. Does not know jobs or routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from penstock.errors import NotReadyError, PenstockError, QueueFullError, RequestError, UsageError
from penstock.server.files import StorageError
from penstock.server.store import StoreError, UnknownJobError
from penstock.wire import Failure

NOT_READY_RETRY_S = 5
STOPPING_RETRY_S = 10
STORAGE_RETRY_S = 5
RANKS_RETRY_S = 5
LONGEST_RETRY_S = 60
"""What the official client obeys; of longer times it takes no notice, and asks again at once."""

MOST_NAME = 80
"""Characters of a name that a client made up, in what it is told."""
_MOST_MESSAGE = 4000

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "wrong_host",
}
_OF_RANKS: dict[str, tuple[int, int | None]] = {
    "request_invalid": (400, None),
    "cancelled": (409, None),
    "out_of_memory": (507, None),
    "generation_failed": (500, None),
    "rank_died": (503, RANKS_RETRY_S),
    "rank_hung": (503, RANKS_RETRY_S),
    "engine_closed": (503, STOPPING_RETRY_S),
    "server_stopped": (503, STOPPING_RETRY_S),
    "server_restarted": (503, RANKS_RETRY_S),
    "server_died": (503, RANKS_RETRY_S),
    "storage_failed": (503, None),  # after the work: to ask again is to do it again
}
"""Failure code of a job: the status of the request that waited for it, and after how many seconds to try again."""
_DIED = re.compile(r"rank [0-9]+ died \([^()]*\)")
_FLAG = re.compile(r"(?<![\w-])--(?:set )?([a-z][a-z0-9-]*)")
_HARMFUL = ("rank_died", "rank_hung")
"""What a client should not repeat by itself, though another try may work: the request may be what ended the ranks."""


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: for the user: what happened, why, what to do; the name of the field in it is cut like `param`.
        code: for programs.
        param: the field at fault, where one is known; 80 characters of it at most.
        retry_after_s: whole seconds after which the same request may work; None where it will not by itself.
        headers: further ones.

    Clients that repeat requests by themselves are told not to where it would not help, or would repeat the damage.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = in_fields(message)
        super().__init__(message)
        if param is not None and len(param) > MOST_NAME:
            for spelt, cut in ((repr(param), repr(param[:MOST_NAME])), (param, param[:MOST_NAME])):
                message = message.replace(spelt, cut)
            param = param[:MOST_NAME]
        self.status = status
        self.message = message[:_MOST_MESSAGE]
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The envelope."""
        return envelope(self.status, self.message, code=self.code, param=self.param)

    def response(self) -> JSONResponse:
        """The answer; clients that retry by themselves are told whether they should."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(min(self.retry_after_s, LONGEST_RETRY_S))
        elif self.status >= 500 or self.status == 409:
            headers["x-should-retry"] = "false"  # the official client would repeat what fails again
        if self.code in _HARMFUL:
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), self.status, headers)


def envelope(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def of_failure(failure: Failure) -> ApiError:
    """What to answer to the request whose job failed so."""
    status, retry_after_s = _OF_RANKS.get(failure.code, (500, None))
    return ApiError(status, failure.message, code=failure.code, param=failure.param, retry_after_s=retry_after_s)


def in_fields(message: str) -> str:
    """Words of the engine for a client: options by their names in `/v1/config`, not as flags of a command line."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), message)


def how_it_died(message: str) -> str | None:
    """How a rank ended, out of the engine's words; without the last line that it printed, which may name files here."""
    found = _DIED.match(message)
    return found[0] if found else None


def invalid(param: str | None, message: str, *, code: str = "invalid_value") -> ApiError:
    """400: a field holds what cannot be."""
    return ApiError(400, message, code=code, param=param)


def stopping() -> ApiError:
    """503: the server is about to leave."""
    return ApiError(
        503, "the server is stopping and takes no new work. Try again.", code="stopping", retry_after_s=STOPPING_RETRY_S
    )


def from_validation(errors: Sequence[Any], advice: Mapping[str, str] | None = None) -> ApiError:
    """400 for what a schema refuses, naming the first field at fault.

    Args:
        errors: as pydantic lists them.
        advice: what to do instead, by field.
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("query", "path", "body", "header")]
    param = ".".join(part for part in place if not part.startswith("function-")) or None
    said = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    said = said[:1].lower() + said[1:]
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) or given is None else f" (it is {str(given)[:80]!r})"
    if first["type"] == "extra_forbidden":
        return invalid(param, f"{param} is no field here. Leave it out.", code="unknown_parameter")
    todo = (advice or {}).get(place[0] if place else "", "Correct it, or leave it out")
    return invalid(param, f"{param or 'the request'}: {said}{shown}. {todo}.")


def install(app: FastAPI) -> None:
    """Answer every failure of an app in the envelope."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(PenstockError, _penstock_error)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _defect)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404 and message == "Not Found":
        message = f"there is no {request.url.path[:MOST_NAME]}. What there is, /openapi.json lists."
    if error.status_code == 405:
        headers = {"allow": ", ".join(allowed_methods(request))}
        path, method = request.url.path[:MOST_NAME], request.method[:MOST_NAME]
        message = f"{path} does not take {method}. It takes {headers['allow']}."
    return ApiError(error.status_code, message, headers=headers).response()


def allowed_methods(request: Request) -> list[str]:
    """All methods of a path; each route knows its own only."""
    path = request.url.path
    routes = [route for route in request.app.state.routes if route.path_regex.match(path)]
    routes = [route for route in routes if route.path == path] or routes
    return sorted({method for route in routes for method in route.methods})


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def _penstock_error(request: Request, error: Exception) -> JSONResponse:
    return from_error(error).response()


def from_error(error: Exception) -> ApiError:
    """The answer to an exception of ours."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, NotReadyError):
        return ApiError(503, str(error), code="not_ready", retry_after_s=NOT_READY_RETRY_S)
    if isinstance(error, StoreError):
        structlog.get_logger().error("the database failed", error=str(error))
        message = "the server's database does not answer as it should. Try again; the server's log says what is wrong."
        return ApiError(503, message, code="storage_failed", retry_after_s=STORAGE_RETRY_S)
    if isinstance(error, UnknownJobError):
        return ApiError(404, str(error), code="not_found", param="after")
    if isinstance(error, StorageError):
        structlog.get_logger().error("the storage failed", error=str(error))
        message = "the server's storage does not answer as it should. Try again; the server's log says what is wrong."
        return ApiError(503, message, code="storage_failed", retry_after_s=STORAGE_RETRY_S)
    if isinstance(error, UsageError):
        return invalid(error.param if isinstance(error, RequestError) else None, str(error))
    return ApiError(500, in_fields(str(error)), code="internal_error")


async def _left(request: Request, error: Exception) -> JSONResponse:
    """The client left while its request was read; nobody hears this."""
    return ApiError(400, "the request ended before its body did. Send all of it.", code="incomplete_body").response()


async def _defect(request: Request, error: Exception) -> JSONResponse:
    message = f"a defect of the server: {type(error).__name__}. Its log has the traceback; please report it."
    headers = {"connection": "close"}
    if name := request.scope.get("state", {}).get("request_id"):
        headers["x-request-id"] = name  # this answer passes by what gives others theirs
    return ApiError(500, message, code="internal_error", headers=headers).response()

"""For those who run the server: is it alive, is it ready, what does it measure, how is it configured.

Owns the routes `/health`, `/ready`, `/metrics` and `/v1/config`. Does not know jobs.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from penstock import __version__
from penstock.server.database import shown_url
from penstock.server.failures import how_it_died
from penstock.server.metrics import CONTENT_TYPE
from penstock.server.openapi import errors
from penstock.server.service import Service, service_of
from penstock.server.threads import WAITING

router = APIRouter(tags=["operations"])

if TYPE_CHECKING:
    from penstock.engine.status import EngineStatus, GroupStatus

_LIVE = ("idle", "busy")
_RETRY = {"retry-after": "5"}
_PROBLEMS = {
    "storage_full": "there is no room for new files; the log says where",
    "storage_lost": "files cannot be written; the log says where",
    "database_lost": "the database's file was removed or replaced; the log says which",
}
_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


@router.get("/live", response_class=JSONResponse, responses={200: {"description": "It answers.", "content": _OBJECT}})
async def live(request: Request) -> JSONResponse:
    """Whether the server itself runs, whatever its ranks do: what does not answer here is to be started again."""
    return JSONResponse({"live": True})


@router.get(
    "/health",
    response_class=JSONResponse,
    responses={
        200: {
            "description": "ok, or degraded where some groups of ranks are not live, or new work cannot be kept.",
            "content": _OBJECT,
        },
        503: {"description": "No group of ranks is live.", "content": _OBJECT},
    },
)
async def health(request: Request) -> JSONResponse:
    """Whether anything can be made, and what the ranks do."""
    service = service_of(request)
    status = service.engine.status()
    problems = service.conditions.problems
    words = _health(status)
    if words == "ok" and problems:
        words = "degraded"
    body = {
        "status": words,
        "queue_depth": status.queue_depth,
        "max_queue": service.settings.max_queue,
        "jobs_unfinished": service.jobs.num_unfinished,
        "steps_per_s": status.steps_per_s,
        "problems": [{"code": code, "message": _PROBLEMS[code]} for code in problems],
        "groups": [_shown(group) for group in status.groups],
    }
    is_up = words in ("ok", "degraded")
    return JSONResponse(body, 200 if is_up else 503, None if is_up else _RETRY)


@router.get(
    "/ready",
    response_class=JSONResponse,
    responses={
        200: {"description": "Requests are taken.", "content": _OBJECT},
        503: {"description": "Not yet, or no longer.", "content": _OBJECT},
    },
)
async def ready(request: Request) -> JSONResponse:
    """Whether new requests are taken."""
    service = service_of(request)
    live = any(group.state in _LIVE for group in service.engine.status().groups)
    problems = [_PROBLEMS[code] for code in service.conditions.problems]
    if live and not service.jobs.is_stopping and not problems:
        return JSONResponse({"ready": True})
    reason = "stopping" if service.jobs.is_stopping else "; ".join(problems) or "no group of ranks is ready"
    return JSONResponse({"ready": False, "reason": reason}, 503, _RETRY)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "For Prometheus.", "content": _TEXT}},
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms, as Prometheus reads them."""
    service = service_of(request)
    text = await WAITING.run(service.metrics.text)
    return Response(text, headers={"content-type": CONTENT_TYPE})


@router.get("/v1/config", responses=errors(503))
async def config(request: Request) -> dict[str, Any]:
    """The configuration that took effect; keys and passwords are not in it."""
    service = service_of(request)
    description = service.engine.description
    return {
        "version": __version__,
        "python": platform.python_version(),
        "model": service.names[0],
        "server": public_settings(service),
        "asked": service.options,
        "effective": None if description is None else description.get("effective"),
    }


def public_settings(service: Service) -> dict[str, Any]:
    """The server's settings without what opens something."""
    settings = asdict(service.settings)
    settings["api_key"] = f"{len(service.settings.api_key)} keys" if service.settings.api_key else None
    if service.settings.database:
        settings["database"] = shown_url(service.settings.database)
    settings["server_name"] = service.jobs.server
    return settings


def _shown(group: GroupStatus) -> dict[str, Any]:
    """A group as everybody may see it: the ids of jobs are their owners' business, what a rank said is the log's."""
    shown = asdict(group)
    if group.state in ("restarting", "failed") and group.message:
        reason = how_it_died(group.message) or "its ranks do not run"
        shown["message"] = f"{reason}. The server's log says more."
    num_orders = len(shown.pop("order_ids"))
    return {**shown, "num_orders": num_orders}


def _health(status: EngineStatus) -> str:
    states = [group.state for group in status.groups]
    live = sum(state in _LIVE for state in states)
    if live:
        return "ok" if live == len(states) else "degraded"
    return "starting" if any(state == "starting" for state in states) else "down"

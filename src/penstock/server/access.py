"""ASGI: one line and one count for each answer, and a name for each request.

Owns what is said of a request: never its body, its query or its key. A request that became a job is told of by its job,
with the breakdown of its seconds, so its success is silent here. Does not know routes.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.metrics import Metrics

_LOWEST_ERROR = 400
_LEFT = 499
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Access:
    """Watches an app's answers.

    Args:
        app: is watched.
        metrics: count them.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._log = structlog.get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and tell of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s, status = time.monotonic(), 0
        name = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = name

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
                self._count(scope, status, time.monotonic() - begun_s)
            await send(message)

        left = 500  # what is raised through here, the outermost layer of the app answers so
        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            left = _LEFT
            raise
        finally:
            if not status:
                status = left
                self._count(scope, status, time.monotonic() - begun_s)
            self._tell(scope, status, time.monotonic() - begun_s)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = route_of(scope)
        method = scope["method"] if scope["method"] in _METHODS else "other"  # clients make up what they like
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.request_s.labels(route).observe(seconds)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        state: dict[str, Any] = scope["state"]
        facts = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        facts["request"] = state["request_id"]
        facts |= {name: state[name] for name in ("owner", "job") if state.get(name)}
        if status >= _LOWEST_ERROR:
            self._log.info("request", **facts)
        else:
            self._log.debug("request", **facts)


def route_of(scope: Scope) -> str:
    """The route's template: a few words, however many jobs there are; "none" where no route fits."""
    route = scope.get("route")
    return str(getattr(route, "path", "") or "none")

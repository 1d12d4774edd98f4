"""What the routes work with: one object per server.

Owns the way from a request to it. Does not know what any of its parts do.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request

from penstock.errors import NotReadyError
from penstock.server.conditions import Conditions
from penstock.server.files import Files
from penstock.server.jobs import Jobs
from penstock.server.metrics import Metrics
from penstock.server.pipeline import Pipeline
from penstock.server.remote import RemoteMedia
from penstock.server.settings import ServeConfig

if TYPE_CHECKING:
    from penstock.engine.engine import Engine

_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server's parts.

    Attributes:
        settings: what the user asked for.
        engine: makes pictures and videos.
        jobs: what is made and was made.
        files: where it is kept.
        media: fetches pictures that are named by URL.
        metrics: counted.
        conditions: whether new work can be kept.
        spool: folder for files on their way.
        names: of the model; the first is the one that is listed.
        options: how the model is loaded and spread, as it was asked for; plain values.
        created: when the server began, in seconds since the epoch.
        gate: a few requests at a time are checked and recorded; where hundreds come at once, other work gets its turn.
    """

    settings: ServeConfig
    engine: Engine
    jobs: Jobs
    files: Files
    media: RemoteMedia
    metrics: Metrics
    conditions: Conditions
    spool: Path
    names: list[str]
    options: dict[str, Any]
    created: int
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def pipeline(self) -> Pipeline:
        """What the model is.

        Raises:
            NotReadyError: before any rank was ready.
        """
        description = self.engine.description
        if description is None:
            raise NotReadyError("the model is still being loaded and takes no requests yet. /ready tells when it does.")
        return Pipeline(description)


def service_of(request: Request) -> Service:
    """The server that a request came to."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Whose request it is; "" where no keys are asked for."""
    return str(request.scope["state"]["owner"])

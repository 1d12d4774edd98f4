"""The application: its parts put together.

Owns the order of what a request passes: count and log, size of the body, key and host, route. Does not know sockets,
signals, or how its parts work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware import Middleware

from penstock import __version__
from penstock.server import contents, failures, images, listing, models, openapi, operations, page, remixes, videos
from penstock.server.access import Access
from penstock.server.conditions import Conditions
from penstock.server.files import Files
from penstock.server.jobs import Jobs
from penstock.server.keys import Guard, Keys
from penstock.server.limits import BodyLimit
from penstock.server.metrics import Metrics
from penstock.server.remote import RemoteMedia
from penstock.server.service import Service
from penstock.server.settings import ServeConfig
from penstock.server.store import Store

if TYPE_CHECKING:
    from penstock.engine.engine import Engine

_ROUTERS = (operations, models, images, remixes, videos, listing, contents, page)


def create_app(
    settings: ServeConfig,
    engine: Engine,
    store: Store,
    files: Files,
    *,
    spool: Path,
    model: str,
    server: str | None = None,
    options: dict[str, Any] | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Its lifespan fails what an earlier server of this name left unfinished, and at the end stops the jobs and closes the
    engine; the caller has checked the storage and started the engine, and closes the store.

    Args:
        settings: limits, keys, names.
        engine: makes pictures and videos.
        store: records jobs.
        files: keeps their files.
        spool: a folder of this process alone, on this machine.
        model: as the user named it; clients may use this name as well as `served_model_name`.
        server: name in the records; `server_name` of the settings where left out.
        options: how the model is loaded and spread, for `/v1/config`.
    """
    metrics = Metrics(engine)
    jobs = Jobs(
        settings, engine=engine, store=store, files=files, metrics=metrics, server=server or settings.server_name
    )
    service = Service(
        settings=settings,
        engine=engine,
        jobs=jobs,
        files=files,
        media=RemoteMedia(settings.allow_remote_media, max_bytes=settings.upload_bytes),
        metrics=metrics,
        conditions=Conditions(
            store.file, [spool, *([files.folder] if files.folder else [])], settings.least_free_bytes
        ),
        spool=spool,
        names=list(dict.fromkeys([settings.served_model_name or model, model])),
        options=options or {},
        created=int(time.time()),
    )
    return _application(service)


def _application(service: Service) -> FastAPI:
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.jobs.start()
        watching = asyncio.create_task(service.conditions.watch())
        try:
            yield
        finally:
            watching.cancel()
            await service.jobs.stop()

    app = FastAPI(
        title="penstock",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # those pages come from elsewhere; /openapi.json is ours
        redoc_url=None,
        middleware=[
            Middleware(Access, metrics=service.metrics),
            Middleware(BodyLimit, num_bytes=settings.upload_bytes, text=settings.max_upload),
            Middleware(Guard, keys=Keys(settings.api_key), host=settings.host, names=settings.allow_host),
        ],
    )
    app.state.service = service
    app.state.settings = settings
    app.state.routes = [route for part in _ROUTERS for route in part.router.routes]
    failures.install(app)
    for part in _ROUTERS:
        app.include_router(part.router)
    openapi.install(app, service)
    return app

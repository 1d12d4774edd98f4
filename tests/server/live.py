"""A live server for tests: uvicorn in a thread, on a free port, with a double in place of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from penstock.server.app import create_app
from penstock.server.connections import AT_ONCE, Connection
from penstock.server.files import Files
from penstock.server.process import bind
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from tests.server.engine_double import EngineDouble

MODEL = "org/double"


@dataclass
class Live:
    """A running server and what it is made of."""

    url: str
    app: FastAPI
    engine: EngineDouble
    store: Store
    files: Files
    spool: Path
    server: uvicorn.Server

    def client(self, key: str | None = None, **options: Any) -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30, **options)


def parts(folder: Path, engine: EngineDouble, **settings: Any) -> tuple[FastAPI, Store, Files, Path]:
    """An app on a folder of its own; two on the same folder are a server that was started again."""
    store = Store(f"sqlite:///{folder}/jobs.db", server="alpha")
    files = Files(f"file://{folder}/files", begin=store.begin_file, abandon=store.abandon_file)
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    config = ServeConfig(**settings)
    app = create_app(config, engine, store, files, spool=spool, model=MODEL, server="alpha")  # type: ignore[arg-type]
    return app, store, files, spool


@contextmanager
def serving(folder: Path, engine: EngineDouble | None = None, **settings: Any) -> Iterator[Live]:
    """A live server; its settings are those of `ServeConfig`."""
    engine = engine or EngineDouble()
    app, store, files, spool = parts(folder, engine, **settings)
    listener = bind("127.0.0.1", 0)
    options: dict[str, Any] = {"log_config": None, "access_log": False, "proxy_headers": False}
    config = uvicorn.Config(app, http=Connection, backlog=AT_ONCE, timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    port = listener.getsockname()[1]
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert server.started
        yield Live(f"http://127.0.0.1:{port}", app, engine, store, files, spool, server)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()
        store.close()
    assert not thread.is_alive()

"""A server with a double of the engine, as a process: python -m tests.server.server_process FOLDER [TROUBLE]."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time

from penstock.errors import ConfigError, PenstockError
from penstock.server import connections
from penstock.server.jobs import Jobs
from penstock.server.process import run
from penstock.server.settings import ServeConfig
from penstock.server.store import StoreError
from tests.server.engine_double import EngineDouble


def main(folder: str, trouble: str = "") -> int:
    os.environ["XDG_CACHE_HOME"] = folder
    engine = EngineDouble("video")
    if trouble in ("held", "stuck"):
        engine.gate.clear()
    if trouble == "stuck":
        engine.close = lambda: time.sleep(3600)  # type: ignore[method-assign]
    if trouble == "mortal":  # its engine fails for good once a job is under way
        engine.gate.clear()
        threading.Thread(target=fail_later, args=(engine,), daemon=True).start()
    if trouble == "narrow":  # few descriptors, and little patience
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        connections.HEAD_S = 2.0
    if trouble == "lifeless":

        async def cannot(self: Jobs) -> None:
            raise StoreError("the database is away.")

        Jobs.start = cannot  # type: ignore[method-assign]
    if trouble == "refused":

        def refuse(timeout_s: float | None = None) -> None:
            raise ConfigError("offload='none' does not fit. Use layerwise.")

        engine.wait_ready = refuse  # type: ignore[method-assign]
    name = "penstock" if trouble == "unnamed" else "alpha"
    settings = ServeConfig(port=0, server_name=name, log_format="json")
    try:
        return run(settings, engine, model="double", say=lambda line: print(line, flush=True))  # type: ignore[arg-type]
    except PenstockError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code


def fail_later(engine: EngineDouble) -> None:
    while not engine.orders:
        time.sleep(0.01)
    engine.state = "failed"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

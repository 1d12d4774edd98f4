"""A server with a double of the engine, as a process: python -m tests.server.server_process FOLDER [TROUBLE]."""

from __future__ import annotations

import os
import sys
import time

from penstock.errors import ConfigError, PenstockError
from penstock.server.process import run
from penstock.server.settings import ServeConfig
from tests.server.engine_double import EngineDouble


def main(folder: str, trouble: str = "") -> int:
    os.environ["XDG_CACHE_HOME"] = folder
    engine = EngineDouble("video")
    if trouble in ("held", "stuck"):
        engine.gate.clear()
    if trouble == "stuck":
        engine.close = lambda: time.sleep(3600)  # type: ignore[method-assign]
    if trouble == "refused":

        def refuse(timeout_s: float | None = None) -> None:
            raise ConfigError("offload='none' does not fit. Use layerwise.")

        engine.wait_ready = refuse  # type: ignore[method-assign]
    settings = ServeConfig(port=0, server_name="alpha", log_format="json")
    try:
        return run(settings, engine, model="double", say=lambda line: print(line, flush=True))  # type: ignore[arg-type]
    except PenstockError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

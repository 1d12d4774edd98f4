"""`penstock serve`: the OpenAI image and video API in front of a model."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from penstock.cli.failures import say
from penstock.cli.options import command
from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed.environment import read_environment
from penstock.errors import ConfigError
from penstock.server.settings import ServeConfig

KEYS_VARIABLE = "PENSTOCK_API_KEYS"


@command
def serve(
    model: Annotated[str, typer.Argument(help="demo, demo-video, a folder saved by diffusers, or a hub id.")],
    *,
    server: ServeConfig,
    load: LoadConfig,
    parallel: ParallelConfig,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it, with a page for people at /."""
    if read_environment() is not None:
        raise ConfigError("serve starts its ranks itself, and a launcher has started this one. Run it by itself.")
    from penstock.engine.engine import Engine
    from penstock.engine.status import EngineConfig
    from penstock.server.process import run

    settings = with_keys(server, os.environ.get(KEYS_VARIABLE, ""))
    limits = EngineConfig(
        max_queue=settings.max_queue,
        max_batch_size=settings.max_batch_size,
        start_timeout_s=settings.start_timeout_s,
        step_timeout_s=settings.step_timeout_s,
        rank_timeout_s=settings.rank_timeout_s,
    )
    engine = Engine(model, parallel=parallel, load=load, config=limits)
    raise typer.Exit(run(settings, engine, model=model, options=asked(load, parallel), say=say))


def with_keys(settings: ServeConfig, variable: str) -> ServeConfig:
    """The settings with the keys of the environment as well: a command line can be read by all users of a machine."""
    keys = [key.strip() for key in variable.split(",") if key.strip()]
    return replace(settings, api_key=list(dict.fromkeys([*settings.api_key, *keys])))


def asked(load: LoadConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """How the model is to be loaded and spread, in plain values."""
    return {"load": asdict(load), "parallel": asdict(parallel)}

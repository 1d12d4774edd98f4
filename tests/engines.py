"""Engines with real ranks, kept for the whole run: each kind starts once; and what their orders were heard to do."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.engine import Engine
from penstock.engine.status import EngineConfig
from penstock.request import GenerationRequest
from penstock.wire import Ended, Made, MadeFile, Order, OrderEvent, Partial, Stage, Step

PROMPT = "a red circle left of a blue square"
SILENCE_S = 4.0
_ENGINES: dict[tuple[Any, ...], Engine] = {}


def running(parallel: ParallelConfig | None = None, load: LoadConfig | None = None, **limits: Any) -> Engine:
    """A ready engine on `demo`; the same one for the same wishes."""
    key = (parallel, load, *sorted(limits.items()))
    if key not in _ENGINES:
        engine = Engine("demo", parallel=parallel, load=load, config=EngineConfig(**limits))
        engine.__enter__()
        atexit.register(engine.close)
        _ENGINES[key] = engine
    return _ENGINES[key]


def order(folder: Path, order_id: str = "one", **values: Any) -> Order:
    """An order for a picture of demo; `of_order` names fields of the order itself."""
    own = values.pop("of_order", {})
    folder = folder / order_id
    folder.mkdir(exist_ok=True)
    request = GenerationRequest(**{"prompt": PROMPT, "seed": 0, **values})
    return Order(id=order_id, request=request, folder=str(folder), **own)


def made(events: list[OrderEvent]) -> list[MadeFile]:
    """The files of an order that went well."""
    last = events[-1]
    assert isinstance(last, Ended) and last.failure is None, last
    return [event.file for event in events if isinstance(event, Made)]


def ending(events: list[OrderEvent]) -> str:
    """How an order ended: the code of its failure, or nothing."""
    assert [type(event) for event in events].count(Ended) == 1
    last = events[-1]
    assert isinstance(last, Ended)
    return last.failure.code if last.failure is not None else ""


def stages(events: list[OrderEvent]) -> list[str]:
    """The names of its stages, in order."""
    return [event.name for event in events if isinstance(event, Stage)]


def steps(events: list[OrderEvent]) -> list[int]:
    """The numbers of its steps, in order."""
    return [event.event.step for event in events if isinstance(event, Step)]


def partials(events: list[OrderEvent]) -> list[Partial]:
    """Its pictures of unfinished latents."""
    return [event for event in events if isinstance(event, Partial)]

"""The engine: it starts ranks, hands them orders, tells what becomes of those, and starts again what died.

    queue -> group of ranks -> Began, (Step | Stage | Partial | Made)*, Ended

One thread owns the socket, the processes and all that is under way; `step` hears, minds, hands out. Importing this
imports neither torch nor diffusers: only ranks do. Does not know HTTP, jobs, or what ranks do inside.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from PIL import Image

from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.fleet import Fleet
from penstock.engine.status import EngineConfig, EngineStatus
from penstock.engine.tasks import Listener
from penstock.errors import (
    CancelledError,
    ConfigError,
    EngineError,
    GenerationError,
    NotReadyError,
    RequestError,
)
from penstock.request import GenerationRequest, GenerationResult, StepEvent
from penstock.wire import Checked, Ended, Failure, Made, MadeFile, Order, OrderEvent, Step

_SEED_LIMIT = 2**32
_CLOSE_S = 30.0


class Engine:
    """Ranks of their own processes that run one model, for whoever asks.

        with Engine("demo") as engine:
            engine.generate(GenerationRequest(prompt="a red circle", seed=0))[0].images[0].save("out.png")

    All methods may be called from any thread.

    Args:
        model: `demo`, `demo-video`, a folder saved by diffusers, or a hub id.
        parallel: how the work is split; `data_parallel_size` groups work side by side behind one queue.
        load: how the model is loaded.
        config: limits of the queue, and of the engine's patience.

    Raises:
        ConfigError: for more ranks than this machine can reasonably have.

    Cost: one process per rank, and one thread here.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        parallel: ParallelConfig | None = None,
        load: LoadConfig | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self._fleet = Fleet(str(model), parallel or ParallelConfig(), load or LoadConfig(), config or EngineConfig())
        self._thread = threading.Thread(target=self._fleet.run, name="penstock-engine", daemon=True)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._has_begun = False
        self._is_closed = False

    def __enter__(self) -> Self:
        """Start, and wait until one group of ranks is ready."""
        with ExitStack() as stack:
            stack.callback(self.close)
            self.start()
            self.wait_ready()
            stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the ranks; returns at once. What keeps them from starting, `wait_ready` tells."""
        with self._lock:
            if not self._has_begun and not self._is_closed:
                self._has_begun = True
                self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until a group of ranks can work.

        Raises:
            UsageError: what the ranks refused: the model's name, an option, a configuration that cannot work.
            ModelError: for files that are missing or corrupt.
            EngineError: where ranks died, or were not ready in time.
            NotReadyError: where the engine is closed, or was never started.
        """
        self._require_here()
        if not self._has_begun and not self._is_closed:
            raise NotReadyError("the engine was never started. Use `with Engine(...)`, or call start().")
        self._fleet.wait_ready(timeout_s)

    def close(self) -> None:
        """End what runs (its orders fail with engine_closed) and all ranks; nothing the second time."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._fleet.close()
            if not self._has_begun:
                self._fleet.run()  # which only tidies up
            elif self._thread is not threading.current_thread():  # a listener's, which ends all once it returns
                self._thread.join(_CLOSE_S)

    def submit(self, order: Order, listener: Listener) -> None:
        """Let an order wait for ranks.

        Args:
            order: what to make; its request has a seed.
            listener: called in the engine's thread with all that happens to it, the last of which is one `Ended`; it
                must not block.

        Raises:
            QueueFullError: with the seconds after which to ask again.
            NotReadyError: where no group has ever been ready, the engine is closed, or another process's.
            RequestError: for a request that cannot travel.
        """
        self._require_here()
        self._fleet.submit(order, listener)

    def require_room(self) -> None:
        """Refuse what `submit` would refuse now, before anything is prepared for it.

        Raises:
            QueueFullError: with the seconds after which to ask again.
            NotReadyError: where no group has ever been ready, or the engine is closed.
        """
        self._require_here()
        self._fleet.require_room()

    def cancel(self, order_id: str) -> None:
        """End an order, wherever it stands; its `Ended` follows once all its ranks have let go. Unknown: nothing."""
        self._fleet.cancel(order_id)

    def check(self, request: GenerationRequest) -> Future[Checked]:
        """Ask a rank, beside its work, whether the pipeline takes a request.

        Returns:
            In the future, its `failure` where it does not, else the size, frames and steps of what it would make, also
            where the request leaves them to the pipeline; NotReadyError where no rank can be asked, or dies meanwhile.
        """
        self._require_here()
        return self._fleet.check(request)

    def _require_here(self) -> None:
        """Refuse a process that was forked from the engine's: threads do not come along."""
        if os.getpid() != self._pid:
            raise NotReadyError(f"the engine is process {self._pid}'s, from which this one was forked. Make one here.")

    def position(self, order_id: str) -> tuple[int, float] | None:
        """How many orders are before one in the queue, and about how many seconds; None where it does not wait."""
        return self._fleet.position(order_id)

    @property
    def description(self) -> dict[str, Any] | None:
        """What the pipeline is and takes, in plain values (`describe`); None before a rank was ready."""
        return self._fleet.description

    def status(self) -> EngineStatus:
        """Groups, ranks, memory and the queue, as they are now."""
        return self._fleet.status()

    def generate(
        self,
        request: GenerationRequest,
        *,
        folder: str | Path | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
    ) -> list[GenerationResult]:
        """Make what is asked for, and wait for it.

        Args:
            request: what is asked for.
            folder: where the files stay; left out, pictures are read and their files removed. Videos and sounds want
                one.
            on_step: called after each denoising step, in this thread; what it raises cancels the request and is raised
                again.

        Returns:
            One result per picture, in order; each has the `path` of its file, and a picture its `images`.

        Raises:
            ConfigError: for a video or a sound without a folder.
            RequestError: for what the pipeline cannot do.
            GenerationError: where it failed; CancelledError where somebody cancelled it.
            EngineError: where its ranks died, or the engine cannot take it.
        """
        kind = (self.description or {}).get("kind", "image")
        if kind != "image" and folder is None:
            raise ConfigError(
                f"the model makes a {kind}, which stays in its file, and no folder is given to keep it in."
            )
        with tempfile.TemporaryDirectory(prefix="penstock-") as spool:
            order = _order(request, str(folder or spool))
            files = []
            with closing(self.events(order)) as events:
                for event in events:
                    if isinstance(event, Step) and on_step is not None:
                        on_step(event.event)
                    if isinstance(event, Made):
                        files.append(event.file)
                    if isinstance(event, Ended):
                        _raise(event.failure)
            return [_result(file, is_kept=folder is not None) for file in sorted(files, key=lambda file: file.item)]

    def events(self, order: Order) -> Generator[OrderEvent]:
        """Submit an order and yield what happens to it, `Ended` last; leaving early cancels it, and waits for that.

        Raises:
            EngineError: see `submit`.
        """
        heard: SimpleQueue[OrderEvent] = SimpleQueue()
        self.submit(order, heard.put)
        event: OrderEvent | None = None
        try:
            while not isinstance(event, Ended):
                event = heard.get()
                yield event
        finally:
            if not isinstance(event, Ended):
                self.cancel(order.id)
                while not isinstance(event, Ended):
                    event = heard.get()


def _order(request: GenerationRequest, folder: str) -> Order:
    """An order of its own for a request; a seed is drawn where it has none."""
    if request.seed is None:
        request = replace(request, seed=secrets.randbelow(_SEED_LIMIT))
    return Order(id=secrets.token_hex(8), request=request, folder=folder)


def _raise(failure: Failure | None) -> None:
    """Raise what a failure stands for."""
    if failure is None:
        return
    if failure.code == "request_invalid":
        raise RequestError(failure.message, failure.param)
    kinds = {"cancelled": CancelledError, **dict.fromkeys(("rank_died", "rank_hung", "engine_closed"), EngineError)}
    raise kinds.get(failure.code, GenerationError)(failure.message)


def _result(file: MadeFile, is_kept: bool) -> GenerationResult:
    """The result that a file holds."""
    images = []
    if file.kind == "image":
        with Image.open(file.path) as picture:
            images = [picture.convert("RGB")]
    return GenerationResult(
        kind=file.kind,
        seed=file.seed,
        images=images,
        sampling_rate_hz=file.sampling_rate_hz,
        frame_rate=file.frame_rate,
        arguments=file.arguments,
        elapsed_s=file.elapsed_s,
        path=file.path if is_kept else None,
    )

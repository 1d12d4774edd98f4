"""A rank of an engine: a process that loads the model, and then does what it is told until it is told to leave.

    python -m penstock.engine.worker < config.json

The main thread works; a thread beside it speaks with the engine and beats, and another answers questions, which may
take as long as a picture takes to open. Owns that process. Does not know how an order is carried out (`work`).
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue

import msgspec
import torch
import zmq

from penstock.distributed.environment import read_environment, start, stop
from penstock.distributed.launcher import obey
from penstock.engine.arguments import checked_arguments
from penstock.engine.build import LoadEvent, Prepared, fill, prepare
from penstock.engine.description import describe
from penstock.engine.placement import choose_device
from penstock.engine.rankgroup import WorkConfig
from penstock.engine.work import Worker
from penstock.errors import PenstockError, RequestError
from penstock.wire import (
    Beat,
    Cancel,
    Check,
    Checked,
    Close,
    Failure,
    FromRank,
    Idle,
    Loading,
    Ready,
    Refused,
    Run,
    encode,
    read_to_rank,
)

_BEAT_MS = 500
_INSIDE = "inproc://speaks"


class Line:
    """This rank's line to its engine: a thread of its own sends, beats and listens, and one answers questions.

    Args:
        config: names the engine's socket and this rank.

    Attributes:
        inbox: what the main thread is to do next; None: leave.
        cancelled: ids of orders that are to end.
        prepared: the model, once questions about requests can be answered.
    """

    def __init__(self, config: WorkConfig) -> None:
        self.inbox: SimpleQueue[Run | None] = SimpleQueue()
        self.cancelled: set[str] = set()
        self.prepared: Prepared | None = None
        self.is_closed = False
        self._context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 1000)
        self._inside = self._context.socket(zmq.PULL)
        self._inside.bind(_INSIDE)
        self._mouth = self._context.socket(zmq.PUSH)
        self._mouth.connect(_INSIDE)
        self._engine = self._context.socket(zmq.DEALER)
        self._engine.identity = config.name.encode()
        self._engine.connect(config.address)
        self._questions: SimpleQueue[Check] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="penstock-line", daemon=True)
        self._thread.start()
        threading.Thread(target=self._answer, name="penstock-answers", daemon=True).start()

    def say(self, message: FromRank) -> None:
        """Send a message to the engine; from the main thread."""
        self._mouth.send(encode(message))

    def close(self) -> None:
        """Send what is left, and end."""
        self._mouth.send(b"")
        self._thread.join()
        self._mouth.close()
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inside, zmq.POLLIN)
        poller.register(self._engine, zmq.POLLIN)
        due_s = time.monotonic()
        while True:
            events = dict(poller.poll(max(0, int(1000 * (due_s - time.monotonic())))))
            if self._inside in events:
                data = self._inside.recv()
                if not data:
                    break
                self._engine.send(data)
            if self._engine in events:
                self._hear(self._engine.recv())
            if time.monotonic() >= due_s:
                self._engine.send(encode(self._beat()))
                due_s = time.monotonic() + _BEAT_MS / 1000
        self._inside.close()
        self._engine.close()

    def _hear(self, data: bytes) -> None:
        message = read_to_rank(data)
        if isinstance(message, Run):
            self.inbox.put(message)
        elif isinstance(message, Cancel):
            self.cancelled.add(message.id)
        elif isinstance(message, Check):
            self._questions.put(message)
        elif isinstance(message, Close):
            self.is_closed = True
            self.inbox.put(None)

    def _answer(self) -> None:
        """Answer one question after the other, as long as there is a line to do it on."""
        with suppress(zmq.ZMQError):  # it is closed
            while True:
                message = self._questions.get()
                checked = encode(self._check(message))
                with self._context.socket(zmq.PUSH) as mouth:
                    mouth.connect(_INSIDE)
                    mouth.send(checked)

    def _check(self, message: Check) -> Checked:
        """Why the pipeline would not take a request, or what it would make."""
        if self.prepared is None:
            return _refused(message, "the model is not loaded yet. Ask again in some seconds.")
        try:
            pipeline, defaults = self.prepared.skeleton.pipeline, self.prepared.notes.defaults
            _, effective = checked_arguments(message.request, pipeline, defaults)
        except RequestError as error:
            return _refused(message, str(error), error.param)
        except Exception as error:  # this thread answers: it must not end
            traceback.print_exc()
            return _refused(message, f"the pipeline's own check failed: {type(error).__name__}.")
        return Checked(number=message.number, **asdict(effective))

    def _beat(self) -> Beat:
        """What this process holds: on a GPU what torch has allocated, on the CPU the weights; on the host all of it."""
        if self.prepared is None:
            device_bytes = 0
        elif self.prepared.device.type == "cuda":
            device_bytes = torch.cuda.memory_allocated(self.prepared.device)
        else:
            device_bytes = self.prepared.plan.promised_bytes
        return Beat(device_bytes=device_bytes, host_bytes=_host_bytes())


def _refused(message: Check, why: str, param: str | None = None) -> Checked:
    return Checked(number=message.number, failure=Failure(code="request_invalid", message=why, param=param))


def _host_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most it ever held
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Load what standard input names, and work until told to leave; exit code 1 where it cannot start."""
    obey()
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkConfig)
    line = Line(config)
    try:
        work(line, config)
    finally:
        line.close()


def work(line: Line, config: WorkConfig) -> None:
    """Make ready, then run what comes."""
    try:
        worker = _made_ready(line, config)
    except PenstockError as error:
        line.say(Refused(kind=type(error).__name__, message=str(error)))
        sys.exit(1)
    while (run := line.inbox.get()) is not None:
        worker.run(run.orders)
        line.cancelled.clear()  # the engine cancels nothing else before it hears that this rank is idle
        line.say(Idle())
    stop()


def _made_ready(line: Line, config: WorkConfig) -> Worker:
    """Join the other ranks, load the model, and tell the engine what it is."""

    def tell(event: LoadEvent) -> None:
        line.say(Loading(component=event.component, done_bytes=event.done_bytes, total_bytes=event.total_bytes))

    environment = read_environment()
    if environment is not None:
        start(environment, choose_device(config.load))
    prepared = prepare(config.model, config.load, config.parallel)
    pipeline = fill(prepared, tell)
    line.prepared = prepared
    gc.freeze()  # what is loaded stays: collections need not look at it again
    worker = Worker(pipeline, prepared, line)
    line.say(Ready(pipeline=describe(prepared)))
    return worker


if __name__ == "__main__":
    main()

"""The server as a process: its socket, its folders, its signals, its end.

Owns what happens from the command line to the last line of the log. Does not know routes or jobs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn

from penstock.errors import ConfigError, PenstockError
from penstock.server.app import create_app
from penstock.server.connections import AT_ONCE, QUEUED, Complaints, Connection, raise_limit
from penstock.server.endings import fail_lost
from penstock.server.failures import STOPPING_RETRY_S
from penstock.server.files import Files
from penstock.server.jobs import Jobs
from penstock.server.keys import check_binding
from penstock.server.logs import logging_to
from penstock.server.settings import ServeConfig
from penstock.server.spool import Spool
from penstock.server.store import Store

if TYPE_CHECKING:
    from penstock.engine.engine import Engine

_GRACE_S = 10
_KEEP_ALIVE_S = 75
_DEFAULT_NAME = "penstock"
_SIGNALLED = 128


def run(
    settings: ServeConfig,
    engine: Engine,
    *,
    model: str,
    options: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Serve until a signal ends it.

    Args:
        settings: what the user asked for.
        engine: not started yet; it is started here, and closed whatever happens.
        model: as the user named it.
        options: how it is loaded and spread, for `/v1/config`.
        say: is told where the server listens, and when the model is ready.

    Returns:
        The exit code: 0, also after a signal that let it end in order.

    Raises:
        UsageError: for settings that cannot be honoured, and what the ranks refused.
        ModelError: for a model that cannot be loaded.
        EngineError: where its ranks cannot be started, or none run any more.
        PenstockError: where the server cannot begin, or must not go on under its name.
    """
    with ExitStack() as stack:
        stack.callback(engine.close)
        check_binding(settings.host, bool(settings.api_key), settings.no_auth)
        raise_limit()
        listener = stack.enter_context(bind(settings.host, settings.port))
        stack.enter_context(logging_to(log_format=settings.log_format))
        name = server_name(settings, listener.getsockname()[1])
        store = Store(settings.database or f"sqlite:///{data_folder()}/jobs.sqlite", server=name)
        stack.callback(store.close)
        place = settings.storage or (data_folder() / "files").as_uri()
        files = Files(place, begin=store.begin_file, abandon=store.abandon_file)
        spool = Spool(data_folder() / "spool")
        stack.callback(spool.close)
        asyncio.run(files.check())
        fail_lost(store, settings)  # and no other server of this name from here on
        app = create_app(settings, engine, store, files, spool=spool.path, model=model, server=name, options=options)
        server = Server(app, engine, address_of(listener), say)
        engine.start()
        gc.collect()
        gc.freeze()  # what is loaded stays: a collection that looks at it holds up everybody for 50 ms
        server.run(sockets=[listener])
        if server.problem is not None:
            raise server.problem
    return 0


class Server(uvicorn.Server):
    """uvicorn, which ends jobs before connections, so that nobody waits for what is no longer made.

    Args:
        app: of `create_app`.
        engine: started.
        address: to tell the user.
        say: is told where the server listens, and when the model is ready.

    Attributes:
        problem: why the server ended by itself; None where it was told to.
    """

    def __init__(self, app: Any, engine: Engine, address: str, say: Callable[[str], None]) -> None:
        proxies: list[str] = app.state.settings.trusted_proxy
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                backlog=AT_ONCE,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(proxies),
                forwarded_allow_ips=proxies,
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self.problem: BaseException | None = None
        self._jobs: Jobs = app.state.service.jobs
        self._engine = engine
        self._address = address
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen while the model is loaded: `/health` tells how far it is."""
        asyncio.get_running_loop().set_exception_handler(Complaints())
        with suppress(SystemExit):  # uvicorn's word for a lifespan that failed, which it has logged
            await super().startup(sockets)
        if not self.started:
            self.problem = self._jobs.problem or PenstockError("the server could not begin. Its log says why.")
            self.should_exit = True
            return
        for listener in sockets or ():
            listener.listen(QUEUED)  # uvicorn has one number for this and for how many are taken at once
        self._say(f"listening at {self._address}; the model is being loaded")
        threading.Thread(target=self._await_engine, name="penstock-ready", daemon=True).start()

    def _await_engine(self) -> None:
        try:
            self._engine.wait_ready()
        except PenstockError as error:
            if not self._jobs.is_stopping:
                self.problem = error
            self.should_exit = True
            return
        self._say(f"ready at {self._address}")

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: told to, or because the server cannot go on."""
        if self._jobs.problem is not None and not self.should_exit:
            self.problem, self.should_exit = self._jobs.problem, True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End jobs, then connections, then the rest."""
        self._jobs.is_stopping = True
        stopping = asyncio.create_task(self._jobs.stop())
        await asyncio.wait({stopping}, timeout=_GRACE_S)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Inside, the signals that end a process end this one in order; a terminal's end does, unless it is ignored."""
        hang_up = signal.SIGHUP
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(hang_up) is signal.SIG_IGN:
            with super().capture_signals():
                yield
            return
        before = signal.signal(hang_up, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(hang_up, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order at the first signal, at once at the second."""
        if self.should_exit:
            os._exit(_SIGNALLED + sig)  # ranks end with this process, and the next start fails what they were at
        structlog.get_logger().info("stopping", signal=signal.Signals(sig).name, retry_after_s=STOPPING_RETRY_S)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: where the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address of this machine: {error.strerror}. Try 127.0.0.1.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(QUEUED)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Stop what does, or give another --port; 0 takes a "
            "free one."
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a socket, as a client on this machine writes it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_name(settings: ServeConfig, port: int) -> str:
    """Its name in the records: the one given, else one that this machine and the port it listens on have alone."""
    if settings.server_name != _DEFAULT_NAME:
        return settings.server_name
    return f"{_DEFAULT_NAME}-{platform.node()}-{port}"


def data_folder() -> Path:
    """Where jobs and files are kept unless told otherwise: `penstock` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "penstock"

"""`penstock serve` as a process, with real ranks, on a free port and a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

from tests import processes

_READY_S = 120.0


class Served:
    """A running server.

    Args:
        model: what it serves.
        folder: where it keeps jobs, files and its log; another one on the same folder is the same server again.
        options: of its command line.
    """

    def __init__(self, model: str | Path, folder: Path, *options: str) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        (folder / "cache").mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "penstock", "serve", str(model), "--port", str(port)]
        with (folder / "log.txt").open("ab") as log:
            self.process = processes.Process[bytes](
                [*command, "--device", "cpu", "--server-name", "tested", *options],
                env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
                stdout=log,
                stderr=log,
            )
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def await_ready(self) -> None:
        """Wait until the model is loaded."""
        deadline_s = time.monotonic() + _READY_S
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.log
            try:
                if self.http.get("/ready").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)

    @property
    def log(self) -> str:
        """All that it has said."""
        return (self.folder / "log.txt").read_text()

    def api(self, **options: Any) -> openai.OpenAI:
        """The official client, which checks what it is answered, and does not try again."""
        options = {"max_retries": 0, "api_key": "unused", "_strict_response_validation": True, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def rank_pids(self) -> list[int]:
        """The processes of its ranks."""
        groups = self.http.get("/health").json()["groups"]
        return [rank["pid"] for group in groups for rank in group["ranks"]]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait."""
        self.process.send_signal(number)
        self.http.close()
        return self.process.wait(60)


@contextmanager
def served(model: str | Path, folder: Path, *options: str) -> Iterator[Served]:
    """A server that is ready, and ended in order."""
    server = Served(model, folder, *options)
    with server.process:
        server.await_ready()
        yield server
        if server.process.poll() is None:
            server.end()

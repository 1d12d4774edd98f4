"""The page where connections break: what it asked for goes on, and is taken up again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.server.browser import Turnstile, Watched, launched
from tests.server.engine_double import EngineDouble
from tests.server.live import serving


class Line:
    """Between a browser and a server; it can be cut, and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_cut = False
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                with self._lock:
                    if self._is_cut:
                        near.close()
                        continue
                    far = socket.create_connection(("127.0.0.1", self._port))
                    self._ends += near, far
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Nothing goes through any more."""
        with self._lock:
            self._is_cut = True
            for end in self._ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._ends.clear()

    def mend(self) -> None:
        """New connections go through."""
        self._is_cut = False

    def close(self) -> None:
        """No more connections."""
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


def test_a_video_is_followed_again_after_the_connection_broke(browser: Browser, tmp_path: Path) -> None:
    engine, gate = EngineDouble("video"), Turnstile()
    engine.gate = gate
    with serving(tmp_path, engine) as live:
        line = Line(int(live.url.rpartition(":")[2]))
        watched = Watched(browser, line.url)
        page, view = watched.page, watched.page.get_by_role("region", name="Result")
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        page.get_by_role("button", name="Make").click()
        gate.let(1)
        expect(view).to_contain_text("step 1 of 4")
        line.cut()
        expect(view).to_contain_text("does not answer")
        expect(page.locator("#machine-line")).to_have_text("the server does not answer")
        gate.let(1)
        line.mend()
        expect(view).to_contain_text("step 2 of 4")
        gate.set()
        expect(view.locator("video")).to_have_js_property("videoWidth", 64)
        expect(page.get_by_role("listitem")).to_have_count(1)
        watched.context.close()
        line.close()
        assert watched.complaints == []


def test_a_request_that_reaches_nobody_is_told(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        line = Line(int(live.url.rpartition(":")[2]))
        watched = Watched(browser, line.url)
        page = watched.page
        page.get_by_label("Prompt", exact=True).fill("a red circle")
        line.cut()
        page.get_by_role("button", name="Make").click()
        expect(page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
        line.mend()
        page.get_by_role("button", name="Make").click()
        expect(page.get_by_alt_text("a red circle")).to_be_visible()
        watched.context.close()
        line.close()
        assert watched.complaints == []

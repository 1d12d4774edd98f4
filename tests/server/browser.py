"""A real browser for tests: Debian's chromium without a window, with a fresh profile for every page.

Where the package `chromium` is not installed the tests are skipped; with PENSTOCK_REQUIRE_SERVICES=1 they fail.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

MOST_WAIT_MS = 10_000
_OPTIONS = (
    "--no-sandbox",  # chromium's own cannot be had by root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def program() -> str:
    """Where chromium is."""
    found = shutil.which("chromium")
    if found is None:
        reason = "chromium is not installed: apt-get install chromium"
        if os.environ.get("PENSTOCK_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """A running browser."""
    path = program()
    expect.set_options(timeout=MOST_WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_OPTIONS))
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page, and what went wrong in it that no test asked for.

    Attributes:
        page: as playwright has it.
        complaints: of its scripts and of the browser: exceptions, refused contents, errors on the console.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(MOST_WAIT_MS)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.goto(url)

    def _hear(self, message: ConsoleMessage) -> None:
        is_answer = message.text.startswith(
            "Failed to load resource"
        )  # an answer that is an error, which tests ask for
        if message.type in ("error", "warning") and not is_answer:
            self.complaints.append(message.text)


class Turnstile(threading.Event):
    """In place of the gate of an `EngineDouble`: lets through as many steps as a test says, or all once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = threading.Semaphore(0)

    def let(self, steps: int) -> None:
        """Let steps through."""
        self._passes.release(steps)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the next step may go."""
        return self.is_set() or self._passes.acquire(timeout=timeout)

"""The page where something does not go as it should, and what it takes over from a job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from penstock.server.files import StorageError
from tests.server.browser import Turnstile, Watched, launched
from tests.server.engine_double import EngineDouble
from tests.server.live import serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


def test_what_could_not_be_cancelled_goes_on(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.jobs.DELETE_S", 0.1)
    with serving(tmp_path, EngineDouble("video")) as live:
        gate = live.engine.gate = Turnstile()
        monkeypatch.setattr(live.engine, "cancel", lambda order_id: None)  # it does not let go
        watched = Watched(browser, live.url)
        page = watched.page
        page.get_by_label("Prompt", exact=True).fill("x")
        page.get_by_role("button", name="Make").click()
        gate.let(1)
        view = page.get_by_role("region", name="Result")
        expect(view).to_contain_text("step 1 of 4")
        view.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("alert").filter(has_text="is being cancelled")).to_be_visible()
        expect(view.get_by_role("button", name="Cancel")).to_be_enabled()
        assert page.get_by_role("status").text_content() != "Cancelled."
        gate.set()
        expect(view.locator("video")).to_be_visible()
        assert watched.complaints == []
        watched.context.close()


def test_what_could_not_be_deleted_stays(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(name: str) -> None:
        raise StorageError("it is away")

    with serving(tmp_path) as live:
        watched = Watched(browser, live.url)
        page = watched.page
        page.get_by_label("Prompt", exact=True).fill("x")
        page.get_by_role("button", name="Make").click()
        view = page.get_by_role("region", name="Result")
        monkeypatch.setattr(live.files, "delete", failing)
        view.get_by_role("button", name="Delete").click()
        view.get_by_role("button", name="Delete for good").click()
        expect(page.get_by_role("alert").filter(has_text="storage does not answer")).to_be_visible()
        expect(page.locator("#gallery button")).to_have_count(1)
        assert watched.complaints == []
        watched.context.close()


def test_size_and_seconds_of_a_job_are_taken_over(tmp_path: Path, browser: Browser) -> None:
    with serving(tmp_path, EngineDouble("video")) as live:
        with live.client() as http:
            http.post("/v1/videos/sync", json={"prompt": "x", "size": "128x64", "seconds": "1", "seed": 3})
        watched = Watched(browser, live.url)
        page = watched.page
        page.get_by_role("button", name="x: completed").click()
        page.get_by_role("button", name="Use these settings").click()
        for label, value in {"Width": "128", "Height": "64", "Frames": "9", "Seed": "3"}.items():
            expect(page.get_by_label(label, exact=True)).to_have_value(value)
        assert watched.complaints == []
        watched.context.close()

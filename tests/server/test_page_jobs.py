"""What the page asks for is a job: it waits at the server, goes on without the page, and keeps what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.browser import Turnstile, Watched, launched
from tests.server.engine_double import described
from tests.server.live import Live, serving
from tests.server.test_page import PROMPT, Open, make, turnstile, view


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path) as live:
        live.engine.gate = Turnstile()
        live.engine.gate.set()
        yield live


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    opened: list[Watched] = []

    def open_page(url: str) -> Page:
        opened.append(Watched(browser, url))
        expect(opened[-1].page.get_by_role("button", name="Make")).to_be_enabled()
        return opened[-1].page

    yield open_page
    for watched in opened:
        watched.context.close()
    assert [complaint for watched in opened for complaint in watched.complaints] == []


def await_that(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_escape_keeps_what_is_finished(live: Live, open_page: Open) -> None:
    page, gate = open_page(live.url), turnstile(live)
    make(page, How_many="3", Seed="7")
    gate.let(5)
    expect(view(page)).to_contain_text("(2 of 3)")
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    expect(view(page).get_by_alt_text(PROMPT)).to_have_js_property("naturalWidth", 64)
    expect(view(page)).to_contain_text("What was finished stays")
    expect(page.locator("#gallery li")).to_have_count(1)
    with live.client() as client:
        (job,) = client.get("/v1/jobs").json()["data"]
        assert len(job["files"]) == 1 and client.get("/health").json()["jobs_unfinished"] == 0


@pytest.mark.parametrize("kind", ["image", "video"])
def test_requests_wait_at_the_server_and_go_on_without_a_page(live: Live, open_page: Open, kind: str) -> None:
    live.engine.description = described(kind)
    page, gate = open_page(live.url), turnstile(live)
    for number in range(6):
        make(page, f"number {number}")
    await_that(lambda: len(live.engine.orders) == 6)  # more than are followed at once
    gate.let(2)
    expect(page.get_by_role("button", name="number 0: in progress")).to_have_text("50 %")
    page.reload()
    page.get_by_role("button", name="number 0: in progress").click()
    expect(view(page)).to_contain_text("step 2 of 4")
    page.close()
    gate.set()
    with live.client() as client:
        await_that(lambda: client.get("/health").json()["jobs_unfinished"] == 0)
        jobs = client.get("/v1/jobs").json()["data"]
    assert sorted(job["prompt"] for job in jobs) == [f"number {number}" for number in range(6)]
    assert {job["status"] for job in jobs} == {"completed"}


def test_sizes_that_are_left_out_are_shown(live: Live, open_page: Open) -> None:
    live.engine.description = {**described(accepts_image=True), "default_width": None, "default_height": None}
    page = open_page(live.url)
    for side in ("Width", "Height"):
        expect(page.get_by_label(side, exact=True)).to_have_attribute("placeholder", "as the picture")
    expect(page.get_by_label("Steps", exact=True)).to_have_attribute("placeholder", "4")
    expect(page.locator("[placeholder='not set']")).to_have_count(0)

"""The page as a user has it: in a real browser, against a live server with an engine's double."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from penstock.server import page as served
from penstock.wire import Failure
from tests.server.browser import Turnstile, Watched, launched
from tests.server.engine_double import EngineDouble, described
from tests.server.live import Live, serving

FILES = sorted(path.name for path in (Path(served.__file__).parent / "page").iterdir())
PROMPT = "a red circle"
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 320, "height": 640}

Open = Callable[..., Page]


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
    """Opens pages, each with a fresh profile; at the end, nothing must have gone wrong in them."""
    with ExitStack() as stack:
        opened: list[Watched] = []

        def open_page(url: str, *, is_ready: bool = True, **options: Any) -> Page:
            watched = Watched(browser, url, **{"viewport": DESKTOP, **options})
            stack.callback(watched.context.close)
            opened.append(watched)
            if is_ready:
                expect(watched.page.get_by_role("button", name="Make")).to_be_enabled()
            return watched.page

        yield open_page
        assert [complaint for watched in opened for complaint in watched.complaints] == []


def make(page: Page, prompt: str = PROMPT, **fields: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Make").click()


def view(page: Page) -> Any:
    return page.get_by_role("region", name="Result")


def turnstile(live: Live) -> Turnstile:
    assert isinstance(live.engine.gate, Turnstile)
    live.engine.gate.clear()
    return live.engine.gate


# ---- the files


def test_the_page_is_a_fixed_set_of_files(live: Live) -> None:
    assert sorted(served.MEDIA_TYPES) == FILES
    with live.client() as client:
        for name in FILES:
            answer = client.get(f"/page/{name}")
            assert answer.status_code == 200 and answer.headers["content-type"] == served.MEDIA_TYPES[name]
        assert client.get("/").text == client.get("/page/index.html").text
        for path in ("/page/page.py", "/page/..%2Fpage.py", "/page/%2e%2e/page.py", "/page/", "/page/style.css/x"):
            answer = client.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["message"], path


def test_it_is_kept_and_asked_for_again(live: Live) -> None:
    with live.client() as client:
        first = client.get("/")
        assert first.headers["cache-control"] == "no-cache"
        again = client.get("/", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
        head = client.head("/")
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", first.headers["etag"])


def test_nothing_comes_from_elsewhere_or_stands_in_line(live: Live) -> None:
    with live.client() as client:
        policy = client.get("/").headers["content-security-policy"]
        text = {name: client.get(f"/page/{name}").text for name in FILES}
    assert {"default-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy.split("; "))
    assert "unsafe" not in policy
    everything = "".join(text.values()).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|\bsrc=\"//|@import|eval\(|innerHTML|document\.write", everything)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=\"|style=\"", text["index.html"])


# ---- making


def test_a_picture_is_made_and_its_progress_moves(live: Live, open_page: Open) -> None:
    page, gate = open_page(live.url), turnstile(live)
    make(page, Seed="5", Steps="4")
    bar = view(page).get_by_role("progressbar")
    for step in (1, 2, 3):
        gate.let(1)
        expect(view(page)).to_contain_text(f"step {step} of 4")
        expect(bar).to_have_js_property("value", step / 4)
    unfinished = view(page).get_by_alt_text("Unfinished picture")
    expect(unfinished).to_have_attribute("src", re.compile("^data:image/png;base64,"))
    expect(unfinished).to_have_js_property("naturalWidth", 8)
    expect(page).to_have_title("75 % penstock")
    gate.let(1)
    picture = view(page).get_by_alt_text(PROMPT)
    expect(picture).to_have_js_property("naturalWidth", 64)
    expect(view(page)).to_contain_text("seed 5")
    expect(page.get_by_role("status")).to_have_text("Done.")
    expect(page).to_have_title("penstock")
    with page.expect_download() as download:
        view(page).get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    assert download.value.suggested_filename.endswith(".png")


def test_several_pictures_have_their_own_seeds(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    make(page, How_many="3", Seed="7")
    expect(view(page).get_by_role("figure")).to_have_count(3)
    for seed in (7, 8, 9):
        expect(view(page)).to_contain_text(f"seed {seed}")
    assert live.engine.orders[0].request.num_images == 3


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_cancel(live: Live, open_page: Open, by: str) -> None:
    page, gate = open_page(live.url), turnstile(live)
    make(page)
    gate.let(1)
    expect(view(page)).to_contain_text("step 1 of 4")
    if by == "button":
        view(page).get_by_role("button", name="Cancel").click()
    else:
        page.keyboard.press(by)
    expect(view(page)).to_have_text("What you make appears here.")
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    expect(page.locator("#gallery li")).to_have_count(0)
    with live.client() as client:
        assert client.get("/v1/jobs").json()["data"] == []
        assert client.get("/health").json()["jobs_unfinished"] == 0


# ---- errors


def test_a_wrong_value_shows_its_error_at_its_field(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    make(page, Width="65")
    width = page.get_by_label("Width", exact=True)
    expect(width).to_have_attribute("aria-invalid", "true")
    expect(width).to_have_accessible_description(re.compile("width=65 is not a multiple of 8. Try 64."))
    expect(width).to_be_focused()
    width.fill("64")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    page.keyboard.press("Control+Enter")
    expect(view(page).get_by_alt_text(PROMPT)).to_be_visible()


def test_what_is_no_number_is_not_sent(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    page.get_by_label("Seed", exact=True).press_sequentially("1e")
    page.get_by_role("button", name="Make").click()
    expect(page.locator("#error-seed")).to_contain_text("not a number")
    assert live.engine.orders == []


def test_what_fails_on_its_way_is_told_and_the_next_one_works(live: Live, open_page: Open) -> None:
    live.engine.failures["bad"] = Failure(code="out_of_memory", message="out of memory: ask for a smaller picture.")
    page = open_page(live.url)
    make(page, "bad")
    expect(view(page)).to_contain_text("out of memory: ask for a smaller picture.")
    expect(page.get_by_role("button", name="bad: failed")).to_be_visible()
    make(page)
    expect(view(page).get_by_alt_text(PROMPT)).to_be_visible()


def test_a_full_queue_is_told(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    live.engine.max_queue = 0
    make(page)
    expect(page.get_by_role("alert").filter(has_text="requests wait already")).to_be_visible()
    expect(page.get_by_role("button", name="Make")).to_be_enabled()


def test_nothing_that_is_written_becomes_html(live: Live, open_page: Open) -> None:
    page, prompt = open_page(live.url), "<img src=x onerror=alert(1)><b>bold</b>"
    make(page, prompt)
    expect(view(page).locator(".prompt")).to_have_text(prompt)
    expect(view(page).get_by_role("figure")).to_have_count(1)
    assert page.locator("b").count() == 0


# ---- what was made before


def test_the_gallery_outlives_the_page(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    make(page, "first", Seed="1", Steps="3", Guidance="2.5")
    expect(page.get_by_role("button", name="first: completed")).to_be_visible()
    make(page, "second", Seed="2", Steps="", Guidance="")
    expect(page.get_by_role("button", name="second: completed")).to_be_visible()
    page.reload()
    tiles = page.locator("#gallery button")
    expect(tiles).to_have_count(2)
    expect(tiles.first).to_have_accessible_name("second: completed")
    tiles.last.click()
    expect(tiles.last).to_have_attribute("aria-current", "true")
    expect(view(page)).to_contain_text("steps3")
    view(page).get_by_role("button", name="Use these settings").click()
    for label, value in {"Prompt": "first", "Seed": "1", "Steps": "3", "Guidance": "2.5", "Width": ""}.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    view(page).get_by_role("button", name="Delete").click()
    expect(tiles).to_have_count(2)
    view(page).get_by_role("button", name="Delete for good").click()
    expect(tiles).to_have_count(1)
    with live.client() as client:
        assert [job["prompt"] for job in client.get("/v1/jobs").json()["data"]] == ["second"]


def test_older_ones_are_shown_on_demand(live: Live, open_page: Open) -> None:
    with live.client() as client:
        for number in range(26):
            client.post("/v1/images/generations", json={"prompt": f"number {number}", "seed": number})
    page = open_page(live.url)
    tiles = page.locator("#gallery button")
    expect(tiles).to_have_count(24)
    page.get_by_role("button", name="Show more").click()
    expect(tiles).to_have_count(26)
    expect(tiles.last).to_have_accessible_name("number 0: completed")
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_video_plays(tmp_path: Path, open_page: Open) -> None:
    with serving(tmp_path, EngineDouble("video")) as live:
        page = open_page(live.url)
        make(page, Frames="9", Frames_per_second="16")
        video = view(page).locator("video")
        expect(video).to_have_js_property("videoWidth", 64)
        video.evaluate("video => { video.muted = true; video.play(); }")
        expect(video).not_to_have_js_property("currentTime", 0)
        assert video.evaluate("video => video.duration") == pytest.approx(9 / 16, abs=0.01)
        expect(page.locator("#gallery img")).to_have_js_property("naturalWidth", 64)
        page.close()  # lets go of the file


# ---- who uses it, and where


def test_a_key_is_asked_for_and_kept_in_the_tab_only(tmp_path: Path, open_page: Open) -> None:
    with serving(tmp_path, api_key=["sesame"]) as live:
        page = open_page(live.url, is_ready=False)
        key = page.get_by_label("API key", exact=True)
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="wrong")).to_be_visible()
        key.fill("sesame")
        key.press("Enter")
        expect(page.get_by_role("dialog")).to_be_hidden()
        make(page)
        expect(view(page).get_by_alt_text(PROMPT)).to_have_js_property("naturalWidth", 64)
        assert page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
            0,
            "",
            ["sesame"],
        ]
        assert "sesame" not in page.content()


def test_the_keyboard_is_enough(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(PROMPT)
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
        shadow = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shadow == "solid" or seen[-1] == "", seen[-1]
        if seen[-1] == "make":
            break
    assert {"field-negative_prompt", "field-width", "field-seed", "make"} <= set(seen)
    page.keyboard.press("Enter")
    expect(view(page).get_by_alt_text(PROMPT)).to_be_visible()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery button")).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.locator("#gallery button").last.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#gallery button").last).to_have_attribute("aria-current", "true")


def test_every_field_has_a_name(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    page.get_by_text("More options").click()
    for field in page.locator(":is(input, textarea, select, button, summary):visible").all():
        expect(field).to_have_accessible_name(re.compile(r"\w"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_in_both_schemes(live: Live, open_page: Open, scheme: str) -> None:
    page = open_page(live.url, color_scheme=scheme)
    names = ("ground", "sheet", "ink", "quiet", "accent", "on-accent", "bad", "bad-soft", "edge", "soft")
    script = """names => names.map(name => {
        const probe = document.createElement("i"); probe.style.color = `var(--${name})`; document.body.append(probe);
        const found = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number); probe.remove(); return found; })"""
    colours = dict(zip(names, page.evaluate(script, names), strict=True))
    assert (luminance(colours["ground"]) < 0.2) == (scheme == "dark")
    texts = [("ink", "ground"), ("ink", "sheet"), ("quiet", "sheet"), ("quiet", "ground"), ("quiet", "soft")]
    for text, ground in [*texts, ("accent", "sheet"), ("on-accent", "accent"), ("bad", "sheet"), ("bad", "bad-soft")]:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["edge"], colours["sheet"]) >= 3
    body = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)")
    assert body == colours["ground"]


def luminance(colour: list[float]) -> float:
    parts = [part / 255 for part in colour[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_narrow_screen_shows_all_of_it(live: Live, open_page: Open) -> None:
    page = open_page(live.url, viewport=PHONE)
    make(page, "a very long word: " + "x" * 200)
    expect(view(page).get_by_role("figure")).to_be_visible()
    page.locator("#machine summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_what_the_machine_does_is_told(live: Live, open_page: Open) -> None:
    page = open_page(live.url)
    expect(page.locator("#machine-line")).to_have_text("idle")
    live.engine.state = "busy"
    turnstile(live)
    make(page)
    expect(page.locator("#machine summary")).to_contain_text("working, 2.5 steps/s")
    page.locator("#machine summary").click()
    expect(page.get_by_role("row")).to_have_count(2)
    expect(page.get_by_role("row").last).to_contain_text("2.0 KiB")
    live.engine.gate.set()


def test_a_model_that_is_being_loaded_is_waited_for(live: Live, open_page: Open) -> None:
    live.engine.description, live.engine.state = None, "starting"
    page = open_page(live.url, is_ready=False)
    expect(page.locator("#machine-line")).to_have_text("loading the model")
    expect(page.get_by_role("button", name="Make")).to_be_disabled()
    live.engine.description, live.engine.state = described(), "idle"
    expect(page.get_by_role("button", name="Make")).to_be_enabled()

"""Every call about videos by the official client, against a live server."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import openai
import pytest

from penstock.wire import Failure
from tests.server.engine_double import EngineDouble
from tests.server.live import MODEL, Live, serving
from tests.server.official import DEPRECATED, client, closing, picture, png, wait_for

__all__ = ["closing"]

pytestmark = DEPRECATED


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("videos"), EngineDouble("video")) as live:
        yield live


@pytest.fixture(scope="module")
def remixes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("remixes"), EngineDouble("video", accepts_image=True)) as live:
        yield live


def test_video_from_create_to_delete(videos: Live) -> None:
    api = client(videos).videos
    video = api.create_and_poll(prompt="a red circle moving right", model=MODEL, seconds="4", size="720x1280")
    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "720x1280", None)
    assert video.num_frames == 33 and video.seconds == "4.1"  # type: ignore[attr-defined]
    assert video.completed_at and video.expires_at and video.expires_at > video.completed_at
    content = api.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].frames == 33
    for variant in ("thumbnail", "spritesheet"):
        assert picture(api.download_content(video.id, variant=variant).read())[0] == "WEBP"
    deleted = api.delete(video.id)
    assert deleted.deleted and deleted.object == "video.deleted" and deleted.id == video.id
    with pytest.raises(openai.NotFoundError):
        api.retrieve(video.id)
    with pytest.raises(openai.NotFoundError):
        api.delete(video.id)


def test_videos_are_listed_page_by_page(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble("video")) as live:
        api = client(live).videos
        made = [api.create(prompt=f"number {number}", size="720x1280").id for number in range(5)]
        assert [video.id for video in api.list(limit=2)] == made[::-1]
        assert [video.id for video in api.list(limit=2, order="asc", after=made[1])] == made[2:]
        page = api.list(limit=2)
        assert page.has_more and page.last_id == made[3]
        with pytest.raises(openai.NotFoundError) as caught:
            api.list(after="video_0").data  # noqa: B018
        assert caught.value.param == "after"


def test_content_of_an_unfinished_video_is_a_conflict(videos: Live) -> None:
    videos.engine.gate.clear()
    try:
        video = client(videos).videos.create(prompt="slow", size="720x1280")
        assert video.status in ("queued", "in_progress") and video.completed_at is None
        with pytest.raises(openai.ConflictError) as caught:
            client(videos, max_retries=2).videos.download_content(video.id)
        assert caught.value.code == "not_completed"
        assert client(videos).videos.delete(video.id).deleted  # which cancels it
    finally:
        videos.engine.gate.set()


def test_deleted_is_said_once_the_ranks_have_let_go(videos: Live) -> None:
    videos.engine.gate.clear()
    videos.engine.letting_go.clear()
    answers: list[object] = []
    try:
        api = client(videos).videos
        video = api.create(prompt="hard to stop", size="720x1280")
        wait_for(lambda: api.retrieve(video.id).status == "in_progress")
        thread = threading.Thread(target=lambda: answers.append(client(videos).videos.delete(video.id)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not answers
        assert api.retrieve(video.id).status == "in_progress"
        videos.engine.letting_go.set()
        thread.join(20)
        assert answers
        with pytest.raises(openai.NotFoundError):
            api.retrieve(video.id)
    finally:
        videos.engine.letting_go.set()
        videos.engine.gate.set()


def test_failed_video_tells_why(videos: Live) -> None:
    videos.engine.failures["boom"] = Failure(code="generation_failed", message="it broke. Try another prompt.")
    video = client(videos).videos.create_and_poll(prompt="boom", size="720x1280")
    assert video.status == "failed" and video.error is not None and video.error.code == "generation_failed"
    assert video.progress < 100
    with pytest.raises(openai.NotFoundError, match="it broke"):
        client(videos).videos.download_content(video.id)


def test_reference_picture(remixes: Live, videos: Live) -> None:
    api = client(remixes).videos
    api.create_and_poll(prompt="it moves", size="720x1280", input_reference=("a.png", png(), "image/png"))
    assert len(remixes.engine.orders[-1].request.pictures["image"]) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        client(videos).videos.create(prompt="it moves", input_reference=png())
    assert caught.value.param == "input_reference"


def test_remix_and_edit(remixes: Live) -> None:
    api = client(remixes).videos
    first = api.create_and_poll(prompt="a red circle", seconds="1", size="720x1280", extra_body={"fps": 8})  # type: ignore[call-overload]
    second = api.remix(first.id, prompt="a blue circle")
    assert second.remixed_from_video_id == first.id and second.prompt == "a blue circle"
    assert api.poll(second.id).size == "720x1280"
    assert len(remixes.engine.orders[-1].request.pictures["image"]) == 1
    content = api.download_content(first.id).read()
    third = api.edit(prompt="a green circle", video=("a.mp4", content, "video/mp4"), extra_body={"size": first.size})
    assert api.poll(third.id).status == "completed"
    with pytest.raises(openai.BadRequestError) as caught:
        api.edit(prompt="a green circle", video=("a.mp4", b"no video", "video/mp4"))
    assert caught.value.param == "video"


def test_what_no_pipeline_can(videos: Live) -> None:
    api = client(videos, max_retries=2).videos
    video = api.create_and_poll(prompt="a red circle", size="720x1280")
    with pytest.raises(openai.BadRequestError) as caught:
        api.remix(video.id, prompt="a blue circle")
    assert caught.value.code == "unsupported_by_model"
    for call in (
        lambda: api.extend(prompt="on", seconds="4", video=("a.mp4", b"x", "video/mp4")),
        lambda: api.create_character(name="ann", video=("a.mp4", b"x", "video/mp4")),
        lambda: api.get_character("char_1"),
    ):
        with pytest.raises(openai.InternalServerError) as refused:
            call()
        assert refused.value.status_code == 501 and refused.value.code == "unsupported"

"""Every call of the API by the official client, which checks the required fields, against a live server."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.wire import Failure
from tests.server.browser import Turnstile
from tests.server.engine_double import EngineDouble
from tests.server.live import MODEL, Live, serving
from tests.server.official import DEPRECATED, client, closing, picture, png, wait_for

__all__ = ["closing"]

pytestmark = DEPRECATED


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("images")) as live:
        yield live


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("edits"), EngineDouble(accepts_image=True)) as live:
        yield live


# ---- images


def test_generate_with_nothing_but_a_prompt(images: Live) -> None:
    answer = client(images).images.generate(prompt="a red circle")
    assert answer.data and picture(answer.data[0].b64_json or "") == ("PNG", (64, 64))
    assert answer.size == "64x64" and answer.output_format == "png" and answer.background == "opaque"
    assert answer.usage is not None and answer.usage.total_tokens == 0


def test_n_images_have_seeds_in_a_row(images: Live) -> None:
    answer = client(images).images.generate(
        prompt="a red circle",
        model=MODEL,
        n=4,
        size="auto",
        quality="auto",
        background="opaque",
        moderation="low",
        user="ann",
        extra_body={"seed": 7, "num_inference_steps": 2, "negative_prompt": "a square", "guidance_scale": 2.5},
    )
    assert answer.data and [item.seed for item in answer.data] == [7, 8, 9, 10]  # type: ignore[attr-defined]
    request = images.engine.orders[-1].request
    assert (request.num_inference_steps, request.negative_prompt) == (2, "a square")
    assert request.arguments == {"guidance_scale": 2.5} and not request.opens_files


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_formats_and_urls(images: Live, name: str) -> None:
    compression = {} if name == "png" else {"output_compression": 30}
    answer = client(images).images.generate(
        prompt="a red circle", size="128x64", output_format=name, response_format="url", **compression
    )
    assert answer.output_format == name and answer.data and answer.data[0].b64_json is None
    with images.client() as http:  # without a key: whoever has the URL may have the file
        got = http.get(str(answer.data[0].url))
    assert got.headers["content-type"] == f"image/{name}" and got.headers["x-content-type-options"] == "nosniff"
    assert picture(got.content) == (name.upper(), (128, 64))


def streamed(live: Live, ask: Callable[[], Iterable[Any]], num_partials: int) -> list[Any]:
    """All events of a stream. The run ends once its partial pictures are seen, for it takes them along."""
    gate = live.engine.gate = Turnstile()
    gate.let(num_partials)
    events = []
    for event in ask():
        events.append(event)
        if len(events) == num_partials:
            gate.set()
    return events


def test_stream_has_partial_images_and_ends_with_usage(images: Live) -> None:
    generate = client(images).images.generate
    events = streamed(images, lambda: generate(prompt="a red circle", stream=True, partial_images=2), 2)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert picture(events[0].b64_json) == ("PNG", (8, 8)) and picture(events[2].b64_json) == ("PNG", (64, 64))


def test_stream_of_several(images: Live) -> None:
    events = list(client(images).images.generate(prompt="a red circle", stream=True, n=3, extra_body={"seed": 4}))
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    assert {event.seed for event in events} == {4, 5, 6}  # type: ignore[union-attr]


def test_failure_within_a_stream_raises(images: Live) -> None:
    images.engine.failures["boom"] = Failure(code="out_of_memory", message="64x64 does not fit. Ask for less.")
    with pytest.raises(openai.APIError, match="does not fit"):
        list(client(images).images.generate(prompt="boom", stream=True))


def test_out_of_memory_is_typed_and_not_repeated(images: Live) -> None:
    images.engine.failures["oom"] = Failure(code="out_of_memory", message="64x64 does not fit. Ask for less.")
    before = len(images.engine.orders)
    with pytest.raises(openai.InternalServerError) as caught:
        client(images, max_retries=2).images.generate(prompt="oom")
    assert caught.value.status_code == 507 and caught.value.code == "out_of_memory"
    assert len(images.engine.orders) == before + 1
    assert client(images).images.generate(prompt="another").data


def test_what_may_have_ended_a_rank_is_not_repeated_by_itself(images: Live) -> None:
    images.engine.failures["die"] = Failure(code="rank_died", message="rank 0 died. Ask again.")
    before = len(images.engine.orders)
    with pytest.raises(openai.InternalServerError) as caught:
        client(images, max_retries=1).images.generate(prompt="die")
    assert caught.value.status_code == 503 and len(images.engine.orders) == before + 1
    assert caught.value.response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"size": "65x64"}, "size"),
        ({"size": "64"}, "size"),
        ({"quality": "high"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"n": 11}, "n"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"extra_body": {"guidence_scale": 3}}, "guidence_scale"),
        ({"extra_body": {"guidance_scale": "much"}}, "guidance_scale"),
        ({"extra_body": {"width": 64}, "size": "64x64"}, "size"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"lora": [{"name": "../secret"}]}}, "lora.0.name"),
        ({"extra_body": {"num_images_per_prompt": 2}}, "num_images_per_prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(images: Live, given: dict[str, object], param: str) -> None:
    before = len(images.engine.orders)
    with pytest.raises(openai.BadRequestError) as caught:
        client(images).images.generate(prompt="a red circle", **given)  # type: ignore[call-overload]
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert len(images.engine.orders) == before


def test_advice_for_what_is_refused(images: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="num_inference_steps"):
        client(images).images.generate(prompt="a red circle", quality="high")
    with pytest.raises(openai.BadRequestError, match="did you mean 'guidance_scale'"):
        client(images).images.generate(prompt="a red circle", extra_body={"guidence_scale": 3})


def test_too_large_names_the_largest(images: Live) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client(images).images.generate(prompt="a red circle", size="8192x4096")
    assert caught.value.status_code == 413 and "5792x2896" in caught.value.message


def test_unknown_model(images: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client(images).images.generate(prompt="a red circle", model="dall-e-9")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_full_queue_is_429_with_a_time(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble(max_queue=0)) as live, pytest.raises(openai.RateLimitError) as caught:
        client(live).images.generate(prompt="a red circle")
    assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "7"


def test_client_that_leaves_cancels(images: Live) -> None:
    images.engine.gate.clear()
    try:
        with pytest.raises(openai.APITimeoutError):
            client(images, timeout=0.5).images.generate(prompt="left alone")
        wait_for(lambda: newest(images)["status"] == "failed")
    finally:
        images.engine.gate.set()
    assert newest(images)["error"]["code"] == "cancelled" and newest(images)["prompt"] == "left alone"


def test_client_that_leaves_a_stream_cancels(images: Live) -> None:
    images.engine.gate.clear()
    try:
        stream = client(images).images.generate(prompt="left alone too", stream=True)
        stream.close()
        wait_for(lambda: newest(images)["status"] == "failed")
    finally:
        images.engine.gate.set()
    assert newest(images)["error"]["code"] == "cancelled" and newest(images)["prompt"] == "left alone too"


def newest(live: Live) -> dict[str, object]:
    with live.client() as http:
        return http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]


# ---- edits


def test_edit_of_one_of_several_and_with_a_mask(edits: Live) -> None:
    one = client(edits).images.edit(image=io.BytesIO(png()), prompt="make it blue", extra_body={"strength": 0.5})
    assert one.data and picture(one.data[0].b64_json or "")[0] == "PNG"
    order = edits.engine.orders[-1]
    assert len(order.request.pictures["image"]) == 1 and order.request.arguments == {"strength": "0.5"}
    files = [("a.png", png(), "image/png"), ("b.png", png(), "image/png")]
    two = client(edits).images.edit(
        image=files, mask=io.BytesIO(png()), prompt="make it blue", n=2, size="128x64", input_fidelity="low"
    )
    assert two.data and len(two.data) == 2
    order = edits.engine.orders[-1]
    assert {name: len(paths) for name, paths in order.request.pictures.items()} == {"image": 2, "mask_image": 1}
    assert not Path(order.folder).exists()


def test_edit_as_a_stream(edits: Live) -> None:
    edit = client(edits).images.edit
    events = streamed(edits, lambda: edit(image=png(), prompt="make it blue", stream=True, partial_images=1), 1)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_edit_wants_a_picture_that_is_one(edits: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(edits).images.edit(image=b"not a picture", prompt="make it blue")
    assert caught.value.param == "image"
    with pytest.raises(openai.APIStatusError) as large:
        client(edits).images.edit(image=png((5000, 4000)), prompt="make it blue")
    assert large.value.status_code == 413


def test_variation(edits: Live) -> None:
    answer = client(edits).images.create_variation(image=png(), n=2, response_format="url", size="64x64")  # type: ignore[call-overload]
    assert len(answer.data) == 2 and answer.data[1].url


def test_pipeline_without_input_pictures_says_so(images: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="takes no input picture") as caught:
        client(images).images.create_variation(image=png())
    assert caught.value.code == "unsupported_by_model"
    with pytest.raises(openai.BadRequestError, match="takes no input picture"):
        client(images).images.edit(image=png(), prompt="make it blue")


# ---- models and keys


def test_models(images: Live) -> None:
    api = client(images).models
    (model,) = api.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "penstock")
    assert api.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        api.retrieve("org/other")


def test_keys_keep_jobs_apart(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble("video"), api_key=["sk-ann", "sk-bob"]) as live:
        ann, bob = client(live, "sk-ann").videos, client(live, "sk-bob").videos
        video = ann.create_and_poll(prompt="a red circle", size="720x1280")
        assert [one.id for one in ann.list()] == [video.id] and not list(bob.list())
        for call in (bob.retrieve, bob.delete, bob.download_content):
            with pytest.raises(openai.NotFoundError):
                call(video.id)
        with pytest.raises(openai.AuthenticationError) as caught:
            client(live, "sk-eve").videos.list()
        assert caught.value.code == "invalid_api_key"
        assert "sk-" not in live.url and ann.retrieve(video.id).id == video.id

"""What pictures and videos have in common on their way to a run."""

from __future__ import annotations

import time
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from penstock.errors import QueueFullError
from penstock.server.store import StoreError
from penstock.wire import Failure
from tests.server.engine_double import EngineDouble
from tests.server.live import serving

_FILE = BytesIO()
Image.new("RGB", (64, 64)).save(_FILE, "png")
PICTURE = _FILE.getvalue()


def test_the_order_of_the_engine(tmp_path: Path) -> None:
    (tmp_path / "crayon.safetensors").touch()
    with serving(tmp_path, EngineDouble(), api_key=["sk-ann"], lora_dir=str(tmp_path)) as live:
        with live.client("sk-ann") as http:
            body = {
                "prompt": "x",
                "output_format": "jpeg",
                "output_compression": 40,
                "stream": True,
                "partial_images": 2,
            }
            http.post("/v1/images/generations", json={**body, "lora": {"name": "crayon", "scale": 0.5}})
        (order,) = live.engine.orders
        job = live.store.get(order.id)
    assert job is not None and order.client == job.owner != ""
    assert (order.format.name, order.format.quality, order.num_partials) == ("jpeg", 40, 2)
    assert order.loras[0].path == str(tmp_path / "crayon.safetensors") and order.folder.startswith(str(live.spool))


def test_without_keys_the_queue_is_fair_between_addresses(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        http.post("/v1/images/generations", json={"prompt": "x"})
        assert live.engine.orders[0].client == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "given", "param"),
    [
        ({"size": "65x64"}, "width", "size"),
        ({"width": 65}, "width", "width"),
        ({"size": "64x65"}, "height", "size"),
        ({"n": 2}, "num_images", "n"),
    ],
)
def test_the_pipelines_words_for_a_field_become_the_clients(
    tmp_path: Path, body: dict[str, object], given: str, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineDouble()
    refusal = Failure(code="request_invalid", message=f"{given} is wrong.", param=given)
    monkeypatch.setattr(engine, "_refusal", lambda request: refusal)
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x", **body})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("error", [QueueFullError("full", 3), StoreError("away")])
def test_what_is_not_accepted_leaves_no_folder(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise error

    with serving(tmp_path) as live, live.client() as http:
        if isinstance(error, StoreError):
            monkeypatch.setattr(live.store, "create", failing)
        else:
            monkeypatch.setattr(live.engine, "submit", failing)
        answer = http.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code in (429, 503) and answer.headers["retry-after"]
        end = time.monotonic() + 20  # what the engine had is over first
        while any(live.spool.iterdir()):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_check_that_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.jobs.CHECK_S", 0.1)
    engine = EngineDouble()
    monkeypatch.setattr(engine, "check", lambda request: Future())
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready" and not live.engine.orders


@pytest.mark.parametrize(
    ("kind", "own", "settings", "status", "param"),
    [
        ("image", {"width": 1024, "height": 1024}, {"max_pixels": "256x256"}, 413, "size"),
        ("image", {"num_inference_steps": 50}, {"max_steps": 20}, 400, "num_inference_steps"),
        ("video", {"num_frames": 161}, {"max_frames": 81}, 413, "num_frames"),
    ],
)
def test_what_the_pipeline_fills_in_is_limited(
    kind: str, own: dict[str, int], settings: dict[str, Any], status: int, param: str, tmp_path: Path
) -> None:
    """Also where its description does not tell: the size may follow from other arguments."""
    engine = EngineDouble(kind)
    assert engine.description is not None
    engine.description |= dict.fromkeys(("default_width", "default_height", "default_num_frames"))
    engine.own |= own
    path = f"/v1/{kind}s" + ("/generations" if kind == "image" else "")
    with serving(tmp_path, engine, **settings) as live, live.client() as http:
        answer = http.post(path, json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        assert live.engine.orders == []
        given = {"size": "64x64", "num_inference_steps": 2, **({"num_frames": 5} if kind == "video" else {})}
        assert http.post(path, json={"prompt": "x", **given}).status_code == 200


def test_what_is_refused_has_the_names_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineDouble(accepts_image=True)
    for said, argument, name in (
        ("DoublePipeline needs 'mask_image': give it.", "mask_image", "mask"),
        ("Give a higher one, such as --set true_cfg_scale=4.", "negative_prompt", "negative_prompt"),
        ("Try --dtype float32 or less --max-weight-memory.", None, None),
    ):
        failure = Failure(code="request_invalid", message=said, param=argument)
        monkeypatch.setattr(engine, "_refusal", lambda request, failure=failure: failure)
        with serving(tmp_path, engine) as live, live.client() as http:
            files = {"image": ("a.png", PICTURE, "image/png")}
            answer = http.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert "--" not in error["message"] and "mask_image" not in error["message"]
        engine = EngineDouble(accepts_image=True)

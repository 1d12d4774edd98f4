"""What pictures and videos have in common on their way to a run."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from penstock.errors import QueueFullError
from penstock.server.store import StoreError
from penstock.wire import Failure
from tests.server.engine_double import EngineDouble
from tests.server.live import serving


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
        assert not [path for path in live.spool.iterdir() if any(path.iterdir())]


def test_a_check_that_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.jobs.CHECK_S", 0.1)
    engine = EngineDouble()
    monkeypatch.setattr(engine, "check", lambda request: Future())
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready" and not live.engine.orders

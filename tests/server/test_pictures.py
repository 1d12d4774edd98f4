"""From the fields of a body to the files of a run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.server.engine_double import EngineDouble
from tests.server.live import Live, serving


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format="PNG")
    return buffer.getvalue()


DATA = "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("pictures"), EngineDouble(accepts_image=True), max_upload="1MiB") as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


def edit(http: httpx2.Client, **body: Any) -> httpx2.Response:
    return http.post("/v1/images/edits", json={"prompt": "x", **body})


@pytest.mark.parametrize(
    "image", [DATA, {"image_url": DATA}, {"image_url": {"url": DATA}}, [DATA, {"image_url": DATA}]]
)
def test_data_urls_in_json(live: Live, http: httpx2.Client, image: Any) -> None:
    assert edit(http, image=image, mask=DATA).status_code == 200
    pictures = live.engine.orders[-1].request.pictures
    assert len(pictures["image"]) == (2 if isinstance(image, list) else 1) and len(pictures["mask_image"]) == 1
    assert all(Path(path).suffix == ".png" for path in pictures["image"])


def test_a_field_of_the_pipeline_by_its_own_name(live: Live, http: httpx2.Client) -> None:
    answer = http.post(
        "/v1/images/generations", data={"prompt": "x"}, files={"mask_image": ("m", png()), "image": ("i", png())}
    )
    assert answer.status_code == 200, answer.text
    assert set(live.engine.orders[-1].request.pictures) == {"image", "mask_image"}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "image"),
        ({"image": []}, 400, "image"),
        ({"image": 5}, 400, "image"),
        ({"image": {"file_id": "file_1"}}, 400, "image"),
        ({"image": "/etc/passwd"}, 400, "image"),
        ({"image": "file:///etc/passwd"}, 400, "image"),
        ({"image": "@/etc/passwd"}, 400, "image"),
        ({"image": "http://169.254.169.254/latest"}, 400, "image"),
        ({"image": "data:image/png;base64,!!!"}, 400, "image"),
        ({"image": "data:image/png;base64," + base64.b64encode(png()[:45]).decode()}, 400, "image"),
        ({"image": DATA, "mask": [DATA, DATA]}, 400, "mask"),
        ({"image": DATA, "mask": DATA, "mask_image": DATA}, 400, "mask_image"),
        ({"image": DATA, "control_image": DATA}, 400, "control_image"),
    ],
)
def test_refusals(live: Live, http: httpx2.Client, body: dict[str, Any], status: int, param: str) -> None:
    before = len(live.engine.orders)
    answer = edit(http, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert len(live.engine.orders) == before and not list(live.spool.iterdir())


def test_unknown_files_of_a_form_are_not_dropped(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": png(), "markup": png()})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "markup"


def test_an_empty_field_of_a_browsers_form_is_none(live: Live, http: httpx2.Client) -> None:
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", png()), "mask": ("", b"")})
    assert answer.status_code == 200 and set(live.engine.orders[-1].request.pictures) == {"image"}


def test_sixteen_pictures_are_the_most(live: Live, http: httpx2.Client) -> None:
    assert (
        edit(http, image=[DATA] * 16).status_code == 200 and len(live.engine.orders[-1].request.pictures["image"]) == 16
    )
    refused = edit(http, image=[DATA] * 17)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "image"
    assert "at most 16" in refused.json()["error"]["message"]


def test_a_decompression_bomb(http: httpx2.Client) -> None:
    answer = edit(http, image="data:;base64," + base64.b64encode(png((9000, 9000))).decode())
    assert answer.status_code == 413 and answer.json()["error"]["param"] == "image"


def test_the_clients_name_of_a_file_is_not_used(live: Live, http: httpx2.Client) -> None:
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("../../x.sh", png(), "text/x-sh")})
    assert answer.status_code == 200
    (path,) = live.engine.orders[-1].request.pictures["image"]
    assert "x.sh" not in path and Path(path).parent.parent == live.spool

"""The OpenAPI document: true of the server, as a machine that makes requests from it finds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.server.engine_double import EngineDouble
from tests.server.live import serving

_ANSWERS_TO_GOOD = "positive_data_acceptance"  # the document cannot say that the sides within `size` are multiples of 8


def attack(url: str, folder: Path, *more: str) -> processes.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--max-examples", "4", "--generation-deterministic", "--exclude-checks", _ANSWERS_TO_GOOD, *more]
    return processes.run(command, cwd=folder, capture_output=True, text=True, timeout=240, stdin=processes.DEVNULL)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_no_request_is_answered_otherwise_than_documented(kind: str, tmp_path: Path) -> None:
    limits = {"max_frames": 17, "max_steps": 20, "max_pixels": "128x128", "max_images": 3}
    with serving(tmp_path, EngineDouble(kind, accepts_image=True), **limits) as live:
        done = attack(live.url, tmp_path)
        with live.client() as http:
            assert http.get("/health").status_code == 200
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Tested: " in done.stdout


@pytest.mark.thorough
def test_with_keys_nothing_is_open_that_should_not_be(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble(), api_key=["sk-ann"], max_steps=20, max_pixels="128x128") as live:
        done = attack(live.url, tmp_path, "--header", "Authorization: Bearer sk-ann", "--phases", "coverage,fuzzing")
        with live.client("sk-ann") as http:
            document = http.get("/openapi.json").json()
    assert done.returncode == 0, done.stdout[-8000:]
    assert document["components"]["securitySchemes"]
    opened = {path for path, one in document["paths"].items() if "security" not in next(iter(one.values()))}
    assert opened == {"/live", "/health", "/ready", "/v1/files/{name}"}


def test_the_document_is_that_of_the_pipeline(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble("video")) as live, live.client() as http:
        document = http.get("/openapi.json").json()
    paths = set(document["paths"])
    assert {"/v1/videos", "/v1/videos/sync", "/v1/jobs/{job_id}/events"} <= paths
    assert not {"/v1/images/generations", "/v1/videos/edits", "/v1/videos/{video_id}/remix"} & paths
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False and body["required"] == ["prompt"]
    assert {"guidance_scale", "num_frames", "seconds", "fps", "lora"} <= body["properties"].keys()


def schemas(engine: EngineDouble, folder: Path, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a route takes as JSON and as a form."""
    with serving(folder, engine) as live, live.client() as http:
        content = http.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
    return content["application/json"]["schema"], content["multipart/form-data"]["schema"]


def test_pictures_are_documented_once_and_where_the_pipeline_takes_them(tmp_path: Path) -> None:
    for schema in schemas(EngineDouble("video"), tmp_path, "/v1/videos"):
        assert "input_reference" not in schema["properties"]
    engine = EngineDouble(accepts_image=True)
    assert engine.description is not None
    engine.description |= {"needs_pictures": ["image", "mask_image"], "accepts_several_images": False}
    as_json, as_form = schemas(engine, tmp_path, "/v1/images/edits")
    assert {"image", "mask"} <= as_json["properties"].keys() and "mask_image" not in as_json["properties"]
    assert {"image", "mask"} <= {*as_json["required"]} and "mask" in as_form["required"]
    assert "image[]" not in as_form["properties"]
    engine = EngineDouble("video", accepts_image=True)
    as_json, _ = schemas(engine, tmp_path, "/v1/videos")
    assert "input_reference" in as_json["properties"] and "image" not in as_json["properties"]


def test_before_the_model_is_known_the_document_has_all_routes(tmp_path: Path) -> None:
    engine = EngineDouble()
    known, engine.description = engine.description, None
    with serving(tmp_path, engine) as live, live.client() as http:
        assert "/v1/videos" in http.get("/openapi.json").json()["paths"]
        engine.description = known
        assert "/v1/videos" not in http.get("/openapi.json").json()["paths"]

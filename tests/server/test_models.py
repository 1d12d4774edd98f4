"""The model over HTTP."""

from __future__ import annotations

from pathlib import Path

from tests.server.engine_double import EngineDouble
from tests.server.live import MODEL, serving


def test_what_its_pipeline_takes(tmp_path: Path) -> None:
    (tmp_path / "crayon.safetensors").touch()
    with serving(tmp_path, lora_dir=str(tmp_path)) as live, live.client() as http:
        (model,) = http.get("/v1/models").json()["data"]
        assert model["id"] == MODEL and model["kind"] == "image"
        assert model["description"]["parameters"]["guidance_scale"]["default"] == 3.5
        assert model["description"]["adapters"] == ["crayon"] and "effective" not in model["description"]
        assert http.get(f"/v1/models/{MODEL}").json() == model
        for empty in ("/v1/models/", "/v1/models//"):
            assert http.get(empty).status_code == 404
        assert http.get("/v1/models/other/model").json()["error"]["code"] == "model_not_found"


def test_both_names_are_known(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble(), served_model_name="painter") as live, live.client() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["painter"]
        for name in ("painter", MODEL):
            assert http.get(f"/v1/models/{name}").json()["id"] == name
            assert http.post("/v1/images/generations", json={"prompt": "x", "model": name}).status_code == 200

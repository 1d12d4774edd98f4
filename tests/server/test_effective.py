"""A folder without `penstock.json`: real ranks fill in what a request leaves out, before it waits."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import diffusers
import pytest
from PIL import Image

from tests import zoo
from tests.server.served import served

pytestmark = pytest.mark.thorough


def picture(mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, (64, 64), "white").save(file, "png")
    return file.getvalue()


def test_inpainting_without_a_size_a_mask_or_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    diffusers.FluxInpaintPipeline(**zoo.build("flux_img2img").components).save_pretrained(folder)
    image, mask = ("image", ("a.png", picture(), "image/png")), ("mask", ("m.png", picture("L"), "image/png"))
    with served(folder, tmp_path, "--max-pixels", "256x256") as server:
        for fields, files, status, param in (
            ({"size": "64x64"}, [image], 400, "mask"),
            ({}, [image, mask], 413, "size"),  # its own is 512x512
            ({"size": "64x64", "strength": "0"}, [image, mask], 400, "strength"),
            ({"size": "64x64", "strength": "7"}, [image, mask], 400, "strength"),
            ({"size": "64x64", "max_sequence_length": "9999"}, [image, mask], 400, "max_sequence_length"),
        ):
            answer = server.http.post("/v1/images/edits", data={"prompt": "x", **fields}, files=files)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        assert server.http.get("/v1/jobs").json()["data"] == []
        made = {"prompt": "x", "size": "64x64", "num_inference_steps": "2"}
        assert server.http.post("/v1/images/edits", data=made, files=[image, mask]).status_code == 200
        described = server.http.get("/v1/models").json()["data"][0]["description"]
    assert described["default_width"] == 512 and described["needs_pictures"] == ["image", "mask_image"]

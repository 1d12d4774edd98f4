"""What a client is told of a pipeline."""

from __future__ import annotations

import json

import pytest

from penstock.config import LoadConfig
from penstock.engine.build import prepare
from penstock.engine.description import describe, effective
from tests import zoo


def test_demo_is_described_in_plain_values() -> None:
    prepared = prepare("demo", LoadConfig(device="cpu"))
    found = describe(prepared)
    assert json.loads(json.dumps(found)) == found
    assert (found["pipeline"], found["kind"], found["size_multiple"]) == ("FluxPipeline", "image", 16)
    assert (found["default_width"], found["default_height"]) == (64, 64)  # the maker's, not Flux's own 1024
    assert "left of" in found["prompt_grammar"] and not found["accepts_image"]
    steps = found["parameters"]["num_inference_steps"]
    assert steps["default"] == 8 and steps["type"]["type"] == "integer" and not steps["is_picture"]
    assert not {"generator", "output_type", "callback_on_step_end"} & found["parameters"].keys()
    assert found["effective"] == effective(prepared) and found["effective"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("flux_img2img", {"kind": "image", "accepts_image": True, "accepts_several_images": False}),
        ("flux2", {"kind": "image", "accepts_image": True, "accepts_several_images": True}),
        ("wan21", {"kind": "video", "frames_argument": "num_frames", "default_frame_rate": 16.0, "frame_multiple": 4}),
        ("ltx2", {"kind": "video", "frames_argument": "num_frames"}),
        ("stable_audio", {"kind": "audio", "frames_argument": None, "default_frame_rate": None}),
    ],
)
def test_every_kind_of_pipeline(name: str, wanted: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    found = describe(prepare(zoo.folder(name, tmp_path_factory.getbasetemp()), LoadConfig(device="cpu")))
    assert {key: found[key] for key in wanted} == wanted
    json.dumps(found, allow_nan=False)
    assert all(found["parameters"][key]["is_picture"] for key in ("image",) if key in found["parameters"])

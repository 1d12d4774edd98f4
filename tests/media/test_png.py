"""Text chunks of a PNG, in any script."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from penstock.media.facts import read_facts
from penstock.media.png import write_png
from penstock.request import GenerationResult


def test_prompt_in_any_script_survives(tmp_path: Path) -> None:
    prompt = "\u7ea2\u8272\u7684\u5706 \u00fc"
    result = GenerationResult(
        kind="image", seed=1, images=[Image.new("RGB", (2, 2))], arguments={"prompt": prompt}, elapsed_s=0.0
    )
    path = tmp_path / "a.png"
    write_png(result, path, {"arguments": {"prompt": prompt}})
    assert read_facts(path)["arguments"]["prompt"] == prompt
    with Image.open(path) as picture:
        assert picture.text["prompt"] == prompt
        assert picture.text["seed"] == "1"


def test_picture_from_elsewhere_has_no_facts(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert read_facts(tmp_path / "a.png") == {}

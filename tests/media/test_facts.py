"""Files from elsewhere have no facts; those of ours are tested beside their writers."""

from __future__ import annotations

import wave
from pathlib import Path

import av
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from penstock.media.facts import read_facts


@pytest.mark.parametrize("text", ["no json", "[1]"])
def test_somebody_elses_text(text: str, tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("penstock", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=chunks)
    assert read_facts(tmp_path / "a.png") == {}


def test_sound_without_a_comment(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setparams((1, 2, 8000, 0, "NONE", ""))
        stream.writeframes(bytes(64))
    assert read_facts(tmp_path / "a.wav") == {}


def test_what_is_no_file_of_the_kind(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(av.error.InvalidDataError):
        read_facts(tmp_path / "a.mp4")

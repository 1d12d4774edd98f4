"""JPEG, WebP, and the small pictures of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penstock.media.facts import read_facts
from penstock.media.files import save
from penstock.media.pictures import write_spritesheet, write_thumbnail
from penstock.request import GenerationResult


def frames(count: int, size: tuple[int, int] = (640, 320)) -> list[Image.Image]:
    """Frames that get lighter."""
    return [Image.new("RGB", size, (8 * number,) * 3) for number in range(count)]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_they_hold_the_picture_and_what_made_it(tmp_path: Path, suffix: str) -> None:
    picture = Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))
    result = GenerationResult(kind="image", seed=7, images=[picture], arguments={"prompt": "ä"}, elapsed_s=1.0)
    path = save(result, tmp_path / f"a.{suffix}", {"model": "demo"})
    assert read_facts(path) == {"model": "demo", "seed": 7, "arguments": {"prompt": "ä"}}
    with Image.open(path) as read:
        assert np.abs(np.asarray(read.convert("RGB"), dtype=int) - np.asarray(picture, dtype=int)).mean() < 4


def test_a_thumbnail_is_the_first_frame_made_small(tmp_path: Path) -> None:
    write_thumbnail(frames(3)[1:], tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as small:
        assert small.size == (480, 240)
        assert np.asarray(small.convert("RGB")).mean() == pytest.approx(8, abs=2)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (5, 4, 2), (16, 4, 4), (30, 4, 4)])
def test_a_spritesheet_goes_through_the_video(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    write_spritesheet(frames(count), tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as sheet:
        assert sheet.size == (columns * 240, rows * 120)
        cells = np.asarray(sheet.convert("L"), dtype=int).reshape(rows, 120, columns, 240).mean((1, 3)).ravel()
    shown = cells[: min(count, 16)]
    assert (np.diff(shown) > 0).all() and shown[-1] >= 8 * (count - count // 16 - 2)

"""Text becomes the value that an annotation wants, strictly, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.engine.values import MisfitError, open_picture, read_value, type_hints
from penstock.errors import RequestError

Picture = Image.Image | np.ndarray | torch.Tensor | list[Image.Image]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3.5", float, 3.5),
        ("4", float, 4.0),
        ("64", int, 64),
        ("true", bool, True),
        ("[1.0, 0.5]", list[float] | None, [1.0, 0.5]),
        ("[64, 32]", tuple[int, int], (64, 32)),
        ("[0, 1, 1]", tuple[int] | None, (0, 1, 1)),  # as diffusers annotates tuples of any length
        ("12", str | list[str], "12"),
        ("a dog", str, "a dog"),
        ("@home", str, "@home"),
        ('{"scale": 0.5}', dict[str, Any] | None, {"scale": 0.5}),
        ("[1]", Any, [1]),
        ("plain", Any, "plain"),
    ],
)
def test_text(text: str, hint: Any, value: object) -> None:
    got = read_value(text, hint)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("much", float),
        ('"3.5"', float),
        ("true", float),
        ("NaN", float),
        ("Infinity", float),
        ("64.5", int),
        ("1", Picture),
    ],
)
def test_text_that_does_not_fit(text: str, hint: Any) -> None:
    with pytest.raises(MisfitError, match="does not fit: .* is wanted"):
        read_value(text, hint)


def test_values_are_checked_and_kept() -> None:
    tensor = torch.zeros(2)
    assert read_value(tensor, torch.Tensor | None) is tensor
    assert read_value(None, float) is None
    assert read_value([512, 512], tuple[int, int]) == (512, 512)
    assert read_value(np.linspace(1, 0, 3), list[float] | None) == [1.0, 0.5, 0.0]
    assert read_value(np.int64(3), int) == 3
    with pytest.raises(MisfitError, match="true or false is wanted"):
        read_value("True", bool)
    with pytest.raises(MisfitError):
        read_value("x", torch.Tensor)
    with pytest.raises(MisfitError):
        read_value(1.5, int)


def test_picture_where_a_picture_is_wanted(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    assert read_value(f"@{tmp_path}/a.png", Picture).size == (3, 2)
    with pytest.raises(MisfitError):
        read_value(f"@{tmp_path}/a.png", float)
    with pytest.raises(RequestError, match="does not exist"):
        read_value("@nowhere.png", Picture)


def test_camera_orientation_and_transparency(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(str(tmp_path / "turned.jpg")).size == (2, 4)
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_broken_exif_block_is_no_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (4, 4)).save(path, exif=b"garbage!")
    with pytest.raises(RequestError, match="cannot be read as a picture: not a TIFF file"):
        open_picture(str(path))


def test_unreadable_pictures(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, message in [("none.png", "does not exist"), ("broken.png", "cannot be read as a picture")]:
        with pytest.raises(RequestError, match=message):
            open_picture(str(tmp_path / name))


def test_hints_that_cannot_be_resolved_are_none_at_all() -> None:
    class Odd:
        """Annotated with a name that is not there."""

        def __call__(self, x: int) -> None: ...

    Odd.__call__.__annotations__["x"] = "Unknown"
    assert type_hints(Odd) == {}

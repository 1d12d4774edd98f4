"""Files appear whole or not at all, where and as they were asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import penstock
from penstock.errors import OutputError
from penstock.media import files
from penstock.media.facts import read_facts
from penstock.media.files import check_target, numbered, save
from penstock.request import GenerationResult


def make_result(kind: Any = "image", **fields: Any) -> GenerationResult:
    images = [] if kind == "audio" else [Image.new("RGB", (4, 2), "red")]
    return GenerationResult(kind=kind, seed=5, images=images, arguments={"prompt": "rot"}, elapsed_s=1.0, **fields)


def test_saved_picture_knows_how_it_was_made(tmp_path: Path) -> None:
    path = penstock.save(make_result(), tmp_path / "a.png", {"model": "m"})
    assert read_facts(path) == {"model": "m", "seed": 5, "arguments": {"prompt": "rot"}}
    assert np.asarray(Image.open(path)).tolist() == [[[255, 0, 0]] * 4] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_existing_file_is_replaced_and_keeps_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    save(make_result(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files._umask()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")

    def half(result: object, target: Path, facts: object) -> None:
        target.write_text("half")
        raise error

    monkeypatch.setitem(files._WRITERS["image"], ".png", half)
    with pytest.raises(OutputError if error is OSError else error):
        save(make_result(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("image", "a.gif", r"makes images, written as \.png, \.jpg, \.jpeg, \.webp\. Try .*a\.png"),
        ("video", "a.png", r"makes videos, written as \.mp4"),
        ("audio", "a", r"makes audios, written as \.wav"),
        ("image", "missing/a.png", "is no folder, so a.png cannot be written there"),
        ("image", "taken.png", "is a folder"),
    ],
)
def test_paths_that_cannot_work(kind: Any, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OutputError, match=message):
        check_target(tmp_path / name, kind)


def test_path_without_a_name() -> None:
    with pytest.raises(OutputError, match="names no file"):
        check_target(Path("."), "image")


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="no permission"):
        check_target(tmp_path / "a.png", "image")


def test_link_keeps_leading_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "real.png").touch()
    (tmp_path / "link.png").symlink_to("real.png")
    save(make_result(), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert read_facts(tmp_path / "real.png")["seed"] == 5


@pytest.mark.parametrize("name", ["n" * 252 + ".png", "\u00fc" * 127 + ".png", "n" * 5000 + ".png"])
def test_name_that_is_too_long(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="longer than 255 bytes|cannot be written"):
        check_target(tmp_path / name, "image")


def test_longest_name_works(tmp_path: Path) -> None:
    assert save(make_result(), tmp_path / ("n" * 251 + ".png")).exists()


def test_metadata_does_not_hide_how_it_was_made(tmp_path: Path) -> None:
    path = save(make_result(), tmp_path / "a.png", {"seed": 99})
    assert read_facts(path)["seed"] == 5


@pytest.mark.parametrize(
    ("item", "count", "name"), [(0, 1, "a.png"), (0, 2, "a-0.png"), (3, 11, "a-03.png"), (10, 11, "a-10.png")]
)
def test_numbering(item: int, count: int, name: str) -> None:
    assert numbered(Path("d/a.png"), item, count) == Path("d") / name

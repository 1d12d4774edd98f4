"""A trace becomes a file: whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.errors import OutputError
from penstock.media.trace import save_trace
from penstock.timeline import Timeline
from tests.media.timelines import streamed


def test_trace_is_saved_as_it_is_exported(tmp_path: Path) -> None:
    timeline = streamed()
    path = save_trace(timeline, tmp_path / "run.json")
    assert path.read_text("utf-8") == timeline.to_chrome()
    assert len(json.loads(path.read_bytes())["traceEvents"]) > len(timeline.spans)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_interrupted_trace_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def interrupted(self: Timeline) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Timeline, "to_chrome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_trace(Timeline(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("run.txt", "Give a path that ends in .json"), (".", "ends in .json"), ("missing/run.json", "cannot be written")],
)
def test_paths_that_cannot_work(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=message):
        save_trace(Timeline(), tmp_path / name)
    assert not list(tmp_path.iterdir())

"""What ranks have made moves into the storage."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from penstock.request import GenerationRequest
from penstock.server.files import Files, StorageError
from penstock.server.keeping import Keeping
from penstock.server.metrics import Metrics
from penstock.server.runs import Run
from penstock.server.store import StoreError
from penstock.wire import MadeFile, Order
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_file, a_job


class Begun:
    """What was said of begun files."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.abandoned: list[str] = []
        self.is_down = False

    def forget_files(self, names: Iterable[str]) -> None:
        if self.is_down:
            raise StoreError("it is away")
        self.forgotten.extend(names)

    def abandon_file(self, name: str) -> None:
        self.abandoned.append(name)


def keep(folder: Path, files: Files, wants_contents: bool = False) -> Run:
    """Keep a video with both of its small pictures."""
    for name in ("a.mp4", "t.webp", "s.webp"):
        (folder / name).write_bytes(name.encode())
    made = MadeFile(
        item=1,
        path=str(folder / "a.mp4"),
        kind="video",
        media_type="video/mp4",
        num_bytes=5,
        seed=8,
        width=64,
        height=48,
        num_frames=5,
        frame_rate=8.0,
        thumbnail=str(folder / "t.webp"),
        spritesheet=str(folder / "s.webp"),
    )
    engine = EngineDouble()

    async def main() -> Run:
        job = a_job(kind="video")
        order = Order(id=job.id, request=GenerationRequest(seed=0), folder=str(folder))
        run = Run(job, order, wants_contents=wants_contents)
        await Keeping(files, Begun(), Metrics(engine)).keep(run, made)  # type: ignore[arg-type]
        return run

    try:
        return asyncio.run(main())
    finally:
        engine.close()


def test_a_result_and_its_small_pictures(tmp_path: Path) -> None:
    files = Files(f"file://{tmp_path}/files")
    run = keep(tmp_path, files, wants_contents=True)
    assert [(file.role, file.media_type, file.num_bytes, file.item) for file in run.kept] == [
        ("result", "video/mp4", 5, 1),
        ("thumbnail", "image/webp", 6, 1),
        ("spritesheet", "image/webp", 6, 1),
    ]
    assert run.kept[0].seed == 8 and run.kept[1].seed is None
    assert run.kept[0].facts == {"width": 64, "height": 48, "num_frames": 5, "frame_rate": 8.0}
    assert base64.b64decode(run.contents[1]) == b"a.mp4"
    for file in run.kept:
        assert (tmp_path / "files" / file.name).stat().st_size == file.num_bytes
    begun = Begun()
    asyncio.run(Keeping(files, begun, None).discard(run.kept))  # type: ignore[arg-type]
    assert not list((tmp_path / "files").iterdir())
    assert begun.forgotten == [file.name for file in run.kept] and not begun.abandoned


def test_contents_that_nobody_wants_are_not_read(tmp_path: Path) -> None:
    assert keep(tmp_path, Files("memory:")).contents == {}


def test_a_storage_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files("memory:")

    async def failing(*arguments: Any) -> Any:
        raise StorageError("full")

    monkeypatch.setattr(files, "put", failing)
    with pytest.raises(StorageError):
        keep(tmp_path, files)
    monkeypatch.setattr(files, "delete", failing)
    begun = Begun()
    keeping = Keeping(files, begun, None)  # type: ignore[arg-type]
    asyncio.run(keeping.discard([a_file("0"), a_file("1")]))
    assert begun.abandoned == ["0", "1"] and not begun.forgotten
    with pytest.raises(StorageError):
        asyncio.run(keeping.remove([a_file("0")]))


def test_what_cannot_be_forgotten_is_left_to_a_sweep(tmp_path: Path) -> None:
    begun = Begun()
    begun.is_down = True
    asyncio.run(Keeping(Files("memory:"), begun, None).discard([a_file("0")]))  # type: ignore[arg-type]
    assert begun.abandoned == ["0"]

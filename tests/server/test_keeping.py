"""What ranks have made moves into the storage."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from penstock.request import GenerationRequest
from penstock.server.files import Files, StorageError
from penstock.server.keeping import Keeping
from penstock.server.metrics import Metrics
from penstock.server.runs import Run
from penstock.wire import MadeFile, Order
from tests.server.engine_double import EngineDouble
from tests.server.jobs import a_file, a_job


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
        await Keeping(files, Metrics(engine)).keep(run, made)  # type: ignore[arg-type]
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
    asyncio.run(Keeping(files, None).discard(run.kept))  # type: ignore[arg-type]
    assert not list((tmp_path / "files").iterdir())


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
    asyncio.run(Keeping(files, None).discard([a_file("0")]))  # type: ignore[arg-type]

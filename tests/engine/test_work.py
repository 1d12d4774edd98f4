"""How an order ends on its rank: whatever the pipeline does, it is told once, and the next one works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.config import LoadConfig
from penstock.engine.build import fill, prepare
from penstock.engine.work import Worker
from penstock.media.facts import read_facts
from penstock.media.files import save
from penstock.wire import Ended, FileFormat, FromRank, Lora, Made
from tests import zoo
from tests.engines import ending, made, order, partials, stages


class Line:
    """Keeps what a worker says; cancels an order once a stage begins."""

    def __init__(self, cancels_at: str = "") -> None:
        self.cancelled: set[str] = set()
        self.is_closed = False
        self.said: list[Any] = []
        self.cancels_at = cancels_at

    def say(self, message: FromRank) -> None:
        self.said.append(message)
        if self.cancels_at and getattr(message, "name", "") == self.cancels_at:
            self.cancelled.add(message.id)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def demo() -> Any:
    prepared = prepare("demo", LoadConfig(device="cpu"))
    return fill(prepared), prepared


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def worker(demo: Any, line: Line) -> Worker:
    return Worker(*demo, line)


def run(worker: Worker, line: Line, *orders: Any) -> list[Any]:
    line.said.clear()
    worker.run(orders)
    return line.said


@pytest.mark.parametrize(("name", "form"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("", "PNG")])
def test_files_have_the_form_that_is_asked_for(
    worker: Worker, line: Line, tmp_path: Path, name: str, form: str
) -> None:
    said = run(worker, line, order(tmp_path, of_order={"format": FileFormat(name=name)}))
    (file,) = made(said)
    with Image.open(file.path) as picture:
        assert picture.format == form and picture.size == (file.width, file.height)
    assert file.num_bytes == Path(file.path).stat().st_size and file.media_type == f"image/{form.lower()}"
    facts = read_facts(file.path)
    assert facts["seed"] == 0 and facts["pipeline"] == "FluxPipeline"


def test_a_lower_quality_makes_a_smaller_file(worker: Worker, line: Line, tmp_path: Path) -> None:
    sizes = [
        made(run(worker, line, order(tmp_path, of_order={"format": FileFormat(name="jpeg", quality=quality)})))[0]
        for quality in (5, 95)
    ]
    assert sizes[0].num_bytes < sizes[1].num_bytes


def test_unfinished_pictures_come_as_files(worker: Worker, line: Line, tmp_path: Path) -> None:
    said = run(worker, line, order(tmp_path, num_images=2, of_order={"num_partials": 2}))
    assert [(partial.item, partial.index) for partial in partials(said)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    last, *shown = (
        np.asarray(Image.open(path), dtype=int) for path in (made(said)[0].path, *(p.path for p in partials(said)[:2]))
    )
    assert np.abs(shown[1] - last).mean() < np.abs(shown[0] - last).mean()
    assert stages(said) == ["encode", "denoise", "decode", "save"] * 2  # decoding on the way is no stage


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "save"])
def test_it_is_cancelled_in_every_stage(demo: Any, tmp_path: Path, stage: str) -> None:
    line = Line(cancels_at=stage)
    said = run(Worker(*demo, line), line, order(tmp_path, num_images=3))
    assert ending(said) == "cancelled" and stages(said).count(stage) == 1
    line.cancels_at = ""
    line.cancelled.clear()
    assert made(run(Worker(*demo, line), line, order(tmp_path)))


def test_a_rank_that_is_to_leave_leaves_its_work(worker: Worker, line: Line, tmp_path: Path) -> None:
    line.is_closed = True
    assert ending(run(worker, line, order(tmp_path))) == "cancelled"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (RuntimeError("mat1 and mat2 cannot be multiplied"), "generation_failed"),
    ],
)
def test_what_the_pipeline_raises_fails_that_order_alone(
    demo: Any, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    pipeline, _ = demo
    worker = Worker(*demo, line)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.vae, "decode", fail)
        said = run(worker, line, order(tmp_path))
    assert ending(said) == code and not list((tmp_path / "one").iterdir())
    assert made(run(worker, line, order(tmp_path)))


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("EXIF data is too long"), "generation_failed"), (MemoryError(), "out_of_memory")]
)
def test_what_a_writer_raises_does_not_end_the_rank(
    worker: Worker, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("penstock.engine.work.save", fail)
        assert ending(run(worker, line, order(tmp_path))) == code
    assert made(run(worker, line, order(tmp_path)))


def test_a_batch_that_fails_runs_one_by_one(
    worker: Worker, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("penstock.engine.work.call", fail)  # by which batches run, and no single order
    said = run(worker, line, order(tmp_path, "one"), order(tmp_path, "two", width=65), order(tmp_path, "three"))
    endings = {event.id: event.failure.code if event.failure else "" for event in said if isinstance(event, Ended)}
    assert endings == {"one": "", "two": "request_invalid", "three": ""}
    assert [event.id for event in said if isinstance(event, Made)] == ["one", "three"]
    assert len([event for event in said if isinstance(event, Ended)]) == 3


def test_what_a_batch_has_made_before_it_fails_stays(
    worker: Worker, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []

    def second_fails(*args: Any, **options: Any) -> Path:
        saved.append("")
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr("penstock.engine.work.save", second_fails)
    said = run(worker, line, order(tmp_path, "one"), order(tmp_path, "two"))
    assert [event.id for event in said if isinstance(event, Made)] == ["one", "two"] and len(saved) == 3
    assert [event.failure for event in said if isinstance(event, Ended)] == [None, None]


def test_long_prompts_fit_no_exif_and_are_written_all_the_same(worker: Worker, line: Line, tmp_path: Path) -> None:
    said = run(
        worker,
        line,
        order(tmp_path, arguments={"prompt_2": "x" * 70_000}, of_order={"format": FileFormat(name="jpeg")}),
    )
    assert read_facts(made(said)[0].path)["arguments"] == "too long for this format"


def test_really_too_little_memory(worker: Worker, line: Line, tmp_path: Path) -> None:
    said = run(worker, line, order(tmp_path, width=2**20, height=2**20, num_inference_steps=1))
    assert ending(said) == "out_of_memory"
    assert made(run(worker, line, order(tmp_path)))


def test_bad_requests_name_the_argument(worker: Worker, line: Line, tmp_path: Path) -> None:
    said = run(worker, line, order(tmp_path, arguments={"guidance_scale": "much"}))
    assert ending(said) == "request_invalid" and said[-1].failure.param == "guidance_scale"
    said = run(worker, line, order(tmp_path, of_order={"loras": (Lora(name="x", path="/nowhere/x"),)}))
    assert ending(said) == "request_invalid" and said[-1].failure.param == "lora"


def test_strangers_texts_open_no_files(worker: Worker, line: Line, tmp_path: Path) -> None:
    prepared = prepare(zoo.folder("flux_img2img", tmp_path), LoadConfig(device="cpu"))
    other = Worker(fill(prepared), prepared, line)
    picture = tmp_path / "in.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    values = {"opens_files": False, "num_inference_steps": 2, "width": 64, "height": 64}
    said = run(other, line, order(tmp_path, arguments={"image": f"@{picture}"}, **values))
    assert ending(said) == "request_invalid" and "a picture is wanted" in said[-1].failure.message
    assert made(run(other, line, order(tmp_path, pictures={"image": (str(picture),)}, **values)))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    prepared = prepare(zoo.folder("ltx2", tmp_path_factory.getbasetemp()), LoadConfig(device="cpu"))
    yield fill(prepared), prepared


def test_videos_come_with_sound_and_small_pictures(video: Any, line: Line, tmp_path: Path) -> None:
    arguments = {key: value for key, value in zoo.ENTRIES["ltx2"].call.items() if key in ("guidance_scale",)}
    said = run(
        Worker(*video, line),
        line,
        order(tmp_path, num_frames=9, width=64, height=64, num_inference_steps=2, arguments=arguments),
    )
    (file,) = made(said)
    assert (file.kind, file.num_frames, file.media_type) == ("video", 9, "video/mp4")
    assert file.sampling_rate_hz and file.frame_rate
    with Image.open(file.thumbnail) as thumbnail, Image.open(file.spritesheet) as sheet:
        assert thumbnail.format == sheet.format == "WEBP"
        assert sheet.width > thumbnail.width and sheet.height > thumbnail.height

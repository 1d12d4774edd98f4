"""`penstock generate` as a user types it: files, JSON, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from typer.testing import CliRunner

from penstock.cli.app import app
from penstock.media.facts import read_facts
from tests import processes

SMALL = ("--size", "56x40", "--steps", "2")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder of its own."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def flux(zoo_folder: Callable[[str], Path]) -> Path:
    return zoo_folder("flux")


def test_picture_with_its_story_inside(flux: Path) -> None:
    result = run(flux, "a red circle", *SMALL, "--seed", "3", "--out", "a.png", "--set", "guidance_scale=2.5")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("a.png  56x40  seed 3  ")
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    facts = read_facts("a.png")
    assert facts["seed"] == 3
    assert facts["arguments"] == {
        "prompt": "a red circle",
        "width": 56,
        "height": 40,
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
    }
    assert facts["pipeline"] == "FluxPipeline" and facts["device"] and facts["dtype"]
    assert set(facts["versions"]) == {"penstock", "diffusers", "torch"}


def test_json_is_one_line_and_repeats_the_picture(flux: Path) -> None:
    first = run(flux, "x", *SMALL, "--num-images", "2", "--json")
    assert first.exit_code == 0 and first.stdout.count("\n") == 1
    told = json.loads(first.stdout)
    assert [output["path"] for output in told["outputs"]] == ["out-0.png", "out-1.png"]
    seed = told["outputs"][1]["seed"]
    assert seed == told["outputs"][0]["seed"] + 1
    assert run(flux, "x", *SMALL, "--seed", seed, "--out", "again.png").exit_code == 0
    assert Image.open("again.png").tobytes() == Image.open("out-1.png").tobytes()


def test_video_with_sound(zoo_folder: Callable[[str], Path]) -> None:
    call = ("--size", "96x32", "--steps", "1", "--num-frames", "9", "--seed", "1")
    for fps in (12, 24):
        result = run(zoo_folder("ltx2"), "a dog", *call, "--fps", fps)
        assert result.exit_code == 0, result.output
        assert f"9 frames at {fps} fps, sound at 24000 Hz" in result.stdout
        with av.open("out.mp4") as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert video.frames == 9 and float(video.average_rate or 0) == fps
            assert audio.codec_context.sample_rate == 24000
            lengths_s = [float(stream.duration * stream.time_base) for stream in (video, audio)]
        assert lengths_s == pytest.approx([9 / fps, 9 / fps], abs=0.15)  # picture and sound go together
        assert read_facts("out.mp4")["frame_rate"] == fps


def test_input_picture(zoo_folder: Callable[[str], Path]) -> None:
    Image.new("RGB", (56, 40), "green").save("in.png")
    result = run(zoo_folder("flux_img2img"), "x", *SMALL, "--image", "in.png", "--set", "strength=0.9")
    assert result.exit_code == 0, result.output
    assert read_facts("out.png")["arguments"]["image"] == "picture 56x40"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "guidance=3"), "FluxPipeline takes no 'guidance'"),
        (("--set", "guidance"), "is not NAME=VALUE"),
        (("--size", "50x40"), "width=50 is not a multiple of 8"),
        (("--num-frames", "5"), "FluxPipeline takes no 'num_frames'"),
        (("--image", "in.png"), "FluxPipeline takes no 'image'"),
        (("--fps", "8"), "fps is for videos"),
        (("--fps", "nan"), "frame_rate=nan is out of range"),
        (("--set", "num_inference_steps=-3"), "num_inference_steps=-3 is not a whole number"),
        (("--set", "guidance_scale=NaN"), "guidance_scale='NaN' does not fit"),
        (("--set", "guidance_scale=1", "--set", "guidance_scale=2"), "--set guidance_scale=... is given twice"),
        (("--set", "output_type=latent"), "'output_type' cannot be set"),
        (("--negative-prompt", "y"), "negative_prompt has no effect"),
        (("--variant", ""), "variant='' is no name"),
        (("--seed", "9223372036854775807", "--num-images", "2"), "is out of range"),
        (("--out", "x" * 300 + ".png"), "longer than 255 bytes"),
        (("--dtype", "float16", "--device", "cpu"), "'float16' is not supported on the CPU"),
        (("--dtype", "int4"), "dtype='int4' is not supported"),
        (("--device", "cuda:99"), "device='cuda:99' is not on this machine"),
        (("--out", "nowhere/a.png"), "nowhere is no folder"),
        (("--out", "a.mp4"), "makes images, written as .png"),
        (("--seed", "-1"), "seed=-1 is out of range"),
        (("--steps", "0"), "num_inference_steps=0 is not a whole number from 1 up"),
        (("--variant", "fp16"), "variant='fp16' is not in"),
        (("--revision", "main"), "revision='main' is for hub models"),
    ],
)
def test_usage_errors_are_one_line_exit_2_and_load_nothing(
    arguments: tuple[str, ...], message: str, flux: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.engine.build._load_component", None)  # calling it would be an internal error
    result = run(flux, "x", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("model", ["nowhere", "owner/name", "."])
def test_model_that_is_none(model: str) -> None:
    result = run(model, "x")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda path: path.write_bytes(b"\xff" * 64)])
def test_harmed_weights_are_one_line_exit_1(harm: Callable[[Path], object], flux: Path, elsewhere: Path) -> None:
    model = Path(shutil.copytree(flux, elsewhere.parent / "model"))
    harm(model / "transformer" / "diffusion_pytorch_model.safetensors")
    result = run(model, "x", *SMALL)
    assert result.exit_code == 1
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "transformer" in result.stderr
    assert list(elsewhere.iterdir()) == []


def test_debug_shows_the_traceback_and_keeps_the_exit_code(flux: Path) -> None:
    result = run(flux, "x", "--size", "50x40", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: width=50")


def test_notes_for_what_runs_and_should_be_known(flux: Path, elsewhere: Path) -> None:
    model = Path(shutil.copytree(flux, elsewhere.parent / "model"))
    config = model / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_single_layers": values["num_single_layers"] - 1}))
    result = run(model, "x", *SMALL)
    assert result.exit_code == 0
    assert result.stderr.startswith("note: transformer: ") and "are not used" in result.stderr


def test_result_of_an_unexpected_kind_is_kept(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.models.sizes.output_kind", lambda pipeline_class: "video")
    result = run(flux, "x", *SMALL, "--out", "a.mp4")
    assert result.exit_code == 0 and Path("a.png").exists()
    assert "note: the pipeline made a image, so a.mp4 became a.png" in result.stderr


def test_interrupted_after_some_pictures_tells_of_them(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.media import files

    stock = files.save

    def interrupted(result: object, path: Path, metadata: object) -> Path:
        if path.name == "out-2.png":
            raise KeyboardInterrupt
        return stock(result, path, metadata)

    monkeypatch.setattr(files, "save", interrupted)
    text = run(flux, "x", *SMALL, "--num-images", "4")
    assert text.exit_code == 130 and [line.split()[0] for line in text.stdout.splitlines()] == [
        "out-0.png",
        "out-1.png",
    ]
    told = run(flux, "x", *SMALL, "--num-images", "4", "--json")
    assert told.exit_code == 130
    values = json.loads(told.stdout)
    assert values["complete"] is False and len(values["outputs"]) == 2


def penstock(*arguments: str, **options: object) -> processes.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *arguments]
    return processes.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("generate", "demo", "x", "--num-images", "two"), "error: Invalid value for '--num-images'"),
        (("generate", "demo", "x", "--stepz", "3"), "error: No such option"),
        (("generate",), "error: Missing "),
        (("paint",), "error: No such command 'paint'"),
    ],
)
def test_misspelt_command_lines_are_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = penstock(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_reader_that_has_gone_is_no_error(flux: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "penstock", "inspect", str(flux)]
    done = processes.run(command, stdout=write, stderr=processes.PIPE, text=True, check=False, timeout=60)
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_interrupt_from_the_first_moment_is_quiet(flux: Path) -> None:
    for delay_s in (0.15, 0.4, 0.45, 1.0):
        command = [sys.executable, "-m", "penstock", "generate", str(flux), "x", "--steps", "100000", "--size", "56x40"]
        with processes.Process[str](command, stderr=processes.PIPE, text=True) as process:
            time.sleep(delay_s)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert "Traceback" not in err
        assert process.returncode in (130, -signal.SIGINT)  # the latter before any of our code runs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_run_leaves_no_file(number: signal.Signals, code: int, flux: Path, elsewhere: Path) -> None:
    command = [sys.executable, "-m", "penstock", "generate", str(flux), "x", "--size", "56x40", "--steps", "100000"]
    with processes.Process[str](command, stderr=processes.PIPE, stdout=processes.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while "diffusion_pytorch_model" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(1)  # well into denoising
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == "" and "Traceback" not in err
    assert list(elsewhere.iterdir()) == []


def test_streamed_run_reports_traces_and_draws(flux: Path, elsewhere: Path) -> None:
    asked = ("generate", str(flux), "x", "--size", "56x40", "--steps", "2", "--seed", "0")
    plain = json.loads(penstock(*asked, "--json", "--out", "plain.png").stdout)
    options = ("--offload", "layerwise", "--check", "--trace", "t.json", "--plot", "p.png", "--json")
    told = json.loads(penstock(*asked, *options, "--out", "streamed.png").stdout)
    with Image.open("plain.png") as one, Image.open("streamed.png") as other:
        assert one.tobytes() == other.tobytes()
    placement = told["placement"]
    assert placement["offload"] == "layerwise" and 0 < placement["peak_bytes"] <= placement["promised_bytes"]
    assert placement["read_bytes"] > 0 == placement["written_bytes"]
    assert plain["placement"]["offload"] == "none"
    assert read_facts(Path("streamed.png"))["offload"] == "layerwise"
    names = {event.get("cat") for event in json.loads(Path("t.json").read_text())["traceEvents"]}
    assert {"fill", "compute"} <= names
    with Image.open("p.png") as drawn:
        assert drawn.width > 1000


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--trace", "t.json"), "nothing does"),
        (("--offload", "layerwise", "--trace", "t.txt"), "written as .json"),
        (("--offload", "layerwise", "--plot", "nowhere/p.png"), "nowhere"),
        (("--offload", "layerwise", "--max-weight-memory", "1KiB"), "below the least that works"),
        (("--enable-cpu-offload", "--enable-layerwise-offload"), "Give one of them"),
    ],
)
def test_placement_that_cannot_work_is_refused_before_loading(
    options: tuple[str, ...], line: str, flux: Path, elsewhere: Path
) -> None:
    done = penstock("generate", str(flux), "x", "--size", "56x40", *options)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
    assert not list(elsewhere.iterdir())

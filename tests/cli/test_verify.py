"""`penstock verify`: its verdict is its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli.app import app
from tests import processes

SMALL = ("--size", "56x40", "--steps", "2")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_same_picture_exits_0(zoo_folder: Callable[[str], Path]) -> None:
    result = run(zoo_folder("flux"), "x", *SMALL)
    assert result.exit_code == 0, result.output
    assert "passed: bit-identical" in result.stdout
    assert "damaged control: latents" in result.stdout


def test_other_picture_exits_1(zoo_folder: Callable[[str], Path]) -> None:
    options = ("--dtype", "bfloat16", "--reference-dtype", "float32", "--no-control", "--json")
    result = run(zoo_folder("flux"), "x", *SMALL, *options)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["passed"] is False and told["control"] == []
    assert told["differences"][0]["max_difference"] > 0 and told["differences"][0]["is_equal"] is False
    assert told["configuration"]["reference_dtype"] == "float32"
    loose = run(zoo_folder("flux"), "x", *SMALL, *options[:-1], "--tolerance", "1")
    assert loose.exit_code == 0 and "within 1 (bfloat16 against float32)" in " ".join(loose.stdout.split())


def test_blind_tolerance_exits_1(zoo_folder: Callable[[str], Path]) -> None:
    result = run(zoo_folder("flux"), "x", *SMALL, "--tolerance", "1e9")
    assert result.exit_code == 1
    assert "the damaged control was not noticed" in " ".join(result.stdout.split())


def test_usage_error_exits_2(zoo_folder: Callable[[str], Path]) -> None:
    result = run(zoo_folder("flux"), "x", "--reference-dtype", "int4")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_stages_make_the_same_picture(zoo_folder: Callable[[str], Path]) -> None:
    arguments = (
        str(zoo_folder("qwen_image")),
        "x",
        *("--size", "64x32", "--steps", "2", "--device", "cpu"),
        "--pipeline-parallel-size",
        "2",
        "--json",
    )
    command = [sys.executable, "-m", "penstock", "verify", *arguments]
    done = processes.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] is True and told["configuration"]["split"] == "pipeline(2)"
    assert not all(difference["is_equal"] for difference in told["control"])


@pytest.mark.parametrize(("mode", "split", "most"), [("tile", "VAE tiles", 0.0), ("patch", "VAE rows", 1e-5)])
def test_a_vae_on_two_ranks_is_compared_with_one_rank(mode: str, split: str, most: float) -> None:
    arguments = ("demo", "x", "--size", "96x80", "--steps", "2", "--device", "cpu", "--vae-patch-parallel-size", "2")
    command = [sys.executable, "-m", "penstock", "verify", *arguments, "--vae-parallel-mode", mode, "--json"]
    done = processes.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["configuration"]["split"].endswith(f"{split} over 2 ranks")
    assert all(difference["relative"] <= most for difference in told["differences"])
    assert not all(difference["is_equal"] for difference in told["control"])

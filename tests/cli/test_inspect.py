"""`penstock inspect` on every pipeline of the zoo."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import penstock
from penstock.cli.app import app
from penstock.cli.inspect import show, size
from tests import zoo


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "stranger"])
def test_every_pipeline(name: str, zoo_folder: Callable[[str], Path]) -> None:
    folder = zoo_folder(name)
    plain, as_json = (CliRunner().invoke(app, ["inspect", str(folder), *flags]) for flags in ([], ["--json"]))
    assert plain.exit_code == as_json.exit_code == 0, plain.output
    assert as_json.stdout.count("\n") == 1
    profile = penstock.Profile.from_json(as_json.stdout)
    assert profile == penstock.inspect(folder)
    words = plain.stdout.split()
    for component in profile.components:
        assert component.name in words and component.role + "," in words
        for stack in component.stacks:
            assert stack.path + ":" in words


def test_object_of_unknown_classes_is_shown() -> None:
    stream = io.StringIO()
    show(penstock.inspect(zoo.build("stranger")), Console(file=stream, width=200))
    assert "towers.1: " in stream.getvalue()
    assert "structure: the largest module of unknown use" in stream.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (5 * 2**30, "5 GiB"), (2**50, "1.02e+03 TiB")],
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_options_that_need_weights_are_refused() -> None:
    result = CliRunner().invoke(app, ["inspect", "demo", "--device", "cpu"])
    assert result.exit_code == 2 and "No such option" in result.output

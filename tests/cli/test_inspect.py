"""`penstock inspect` on every pipeline of the zoo."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import penstock
from penstock.cli.app import app
from penstock.cli.inspect import show
from tests import zoo
from tests.cli.test_generate import penstock as command


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


def test_options_of_placement_show_where_the_weights_would_go(zoo_folder: Callable[[str], Path]) -> None:
    folder = str(zoo_folder("flux"))
    plain = command("inspect", folder)
    placed = command("inspect", folder, "--offload", "layerwise")
    assert "offload layerwise on cpu (as asked for): at most" in placed.stdout
    assert "least possible" not in plain.stdout
    told = json.loads(command("inspect", folder, "--offload", "sequential", "--json").stdout)
    assert told["plan"]["offload"] == "sequential" and told["plan"]["arena_bytes"] <= told["plan"]["weight_bytes"]
    refused = command("inspect", folder, "--offload", "layerwise", "--max-weight-memory", "1KiB")
    assert refused.returncode == 2 and "below the least that works" in refused.stderr

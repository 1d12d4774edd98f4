"""The public face: names, laziness, `python -m penstock`."""

from __future__ import annotations

import sys

import pytest

import penstock
from tests import processes


def test_every_public_name_resolves() -> None:
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
    assert dir(penstock) == sorted(penstock.__all__)


def test_public_names_are_these() -> None:
    functions = {name for name in penstock.__all__ if name.islower() and not name.startswith("_")}
    assert functions == {"apply", "generate", "inspect", "load", "placed_on", "save", "verify"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        _ = penstock.paint


def test_module_runs_as_a_command() -> None:
    done = processes.run([sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"penstock {penstock.__version__}\n"

"""The commands there are."""

from __future__ import annotations

from typer.testing import CliRunner

from penstock import __version__
from penstock.cli.app import app


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"penstock {__version__}\n"


def test_commands() -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == {
        "generate",
        "inspect",
        "serve",
        "verify",
    }


def test_unknown_command_and_unknown_flag_are_usage_errors() -> None:
    assert CliRunner().invoke(app, ["paint"]).exit_code == 2
    assert CliRunner().invoke(app, ["generate", "demo", "x", "--stepz", "3"]).exit_code == 2

"""One line and an exit code for whatever happens; a traceback only when asked for."""

from __future__ import annotations

import pytest
import typer

from penstock.cli.failures import reported
from penstock.cli.interrupts import Dismissal
from penstock.errors import RequestError, WeightsError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("no such\n  argument"), 2, "error: no such argument"),
        (RequestError("Give more, such as scale=4."), 2, "error: Give more, such as --set scale=4."),
        (WeightsError("cut short"), 1, "error: cut short"),
        (KeyboardInterrupt(), 130, "interrupted; no unfinished file is left behind."),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero Run again with --debug"),
    ],
)
def test_failures_are_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, reported(debug=False):
        raise error
    assert stopped.value.exit_code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line) and captured.err.count("\n") == 1


def test_rank_that_is_dismissed_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, reported(debug=False):
        raise Dismissal
    assert stopped.value.exit_code == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "code"), [(RequestError("x"), 2), (ZeroDivisionError("x"), 1)])
def test_debug_shows_everything(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, reported(debug=True):
        raise error
    assert stopped.value.exit_code == code
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_of_commands_pass() -> None:
    with pytest.raises(typer.Exit) as stopped, reported(debug=False):
        raise typer.Exit(1)
    assert stopped.value.exit_code == 1

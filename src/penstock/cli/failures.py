"""From an exception to one clear line and an exit code: 2 for usage, 1 for failure, 130 for Ctrl-C."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from penstock.cli.interrupts import INTERRUPTED, Dismissal
from penstock.distributed.environment import read_environment
from penstock.distributed.launcher import tell
from penstock.errors import ConfigError, PenstockError, RequestError, UsageError

_ADVICE = re.compile(r"such as (\w+=)")


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Run a command; what it raises becomes one line on standard error, or a traceback with `--debug`."""
    if not debug:
        _silence_libraries()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not isinstance(interrupt, Dismissal):
            say("interrupted; no unfinished file is left behind.")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except PenstockError as error:
        _explain(f"error: {_in_flags(error)}", debug)
        raise typer.Exit(error.exit_code) from None
    except Exception as error:  # a defect of penstock's: still no traceback unless asked for
        _explain(f"internal error: {type(error).__name__}: {error} Run again with --debug to see where.", debug)
        raise typer.Exit(PenstockError.exit_code) from None


def _in_flags(error: PenstockError) -> str:
    """An error in the words of a command line: further arguments of a pipeline are given by `--set`."""
    return _ADVICE.sub(r"such as --set \1", str(error)) if isinstance(error, RequestError) else str(error)


def _silence_libraries() -> None:
    """Keep standard error for our own lines; the variables are read when the libraries are first imported."""
    warnings.simplefilter("ignore")
    for library in ("diffusers", "transformers", "huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "critical")


def _explain(line: str, debug: bool) -> None:
    """Say what happened; a rank other than 0 says who it is and, for what is no usage error, where it happened."""
    rank = _rank()
    if debug or (rank and not isinstance(sys.exception(), UsageError)):
        traceback.print_exc()
    tell(line)
    say(f"rank {rank}: {line}" if rank else line)


def _rank() -> int:
    try:
        environment = read_environment()
    except ConfigError:  # which is what is being said
        return 0
    return environment.rank if environment else 0


def say(text: str) -> None:
    """Print one line on standard error, whatever the text's own lines."""
    typer.echo(" ".join(text.split()), err=True)

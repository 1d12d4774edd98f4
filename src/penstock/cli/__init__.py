"""The command line: generate, inspect, serve, verify. Torch is imported only once a command needs it."""

from __future__ import annotations

import os
import sys
from typing import Any

from penstock.cli.interrupts import INTERRUPTED, leave_on_interrupt
from penstock.distributed.launcher import obey

USAGE = 2


def main() -> None:
    """Entry point of the `penstock` command: usage errors are one line, Ctrl-C is quiet from the first moment."""
    obey()
    leave_on_interrupt()
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> int:
    import typer

    from penstock.cli.app import app
    from penstock.cli.failures import say

    usage_error: Any = typer.BadParameter.__base__  # of the click that typer carries inside
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        where = error.ctx.command_path if error.ctx else "penstock"
        say(f"error: {error.format_message()} See {where} --help.")
        return USAGE
    except typer.Abort:
        return INTERRUPTED
    return code if isinstance(code, int) else 0

"""`penstock`: the commands and where they live."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock import __version__
from penstock.cli.generate import generate
from penstock.cli.inspect import inspect
from penstock.cli.serve import serve
from penstock.cli.verify import verify

app = typer.Typer(
    name="penstock",
    help="Run any unmodified diffusers pipeline in the memory and on the devices there are.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(inspect)
app.command()(serve)
app.command()(verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run any unmodified diffusers pipeline in the memory and on the devices there are."""

"""`penstock verify`: is the picture the same as stock diffusers makes?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from penstock.cli.options import RequestOptions, command
from penstock.cli.ranks import check_replicas, take_place
from penstock.config import LoadConfig, ParallelConfig, option

if TYPE_CHECKING:
    from penstock.engine.parity import Verification

_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What counts as the same picture."""

    tolerance: float | None = option(
        None,
        "Largest relative difference that passes. 0, bit equality; measured where ranks make sums in another order.",
        "N",
    )
    reference_dtype: str | None = option(None, "dtype of the plain run; the same where left out.", "NAME")


@command
def verify(
    model: Annotated[str, typer.Argument(help="demo, demo-video, a folder saved by diffusers, or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    *,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Also run with one damaged weight, which must be noticed.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")] = False,
    request: RequestOptions,
    limits: LimitOptions,
    load: LoadConfig,
    parallel: ParallelConfig,
) -> None:
    """Run stock diffusers and penstock with these options, same seed, and compare latents and output.

    Exits with 1 where they differ by more than the tolerance, or where the damaged control is not noticed.
    """
    asked = request.request(prompt)
    check_replicas(parallel, num_images=1)
    place = take_place(parallel)
    from penstock.engine.parity import verify as run

    with place.joined(load):
        verification = run(
            model,
            asked,
            tolerance=limits.tolerance,
            reference_dtype=limits.reference_dtype,
            control=control,
            parallel=parallel,
            **asdict(load),
        )
    if not place.speaks:
        return
    if as_json:
        typer.echo(verification.to_json())
    else:
        show(verification, Console())
    if not verification.passed:
        raise typer.Exit(_FAILED)


def show(verification: Verification, console: Console) -> None:
    """Print the comparison as a table and a verdict."""
    table = Table("compared with stock diffusers", "shape", "max difference", "relative", "PSNR")
    rows = [("", verification.differences), ("damaged control: ", verification.control)]
    for label, differences in rows:
        for difference in differences:
            table.add_row(
                label + difference.name,
                "x".join(map(str, difference.shape)),
                f"{difference.max_difference:.3g}",
                f"{difference.relative:.3g}",
                "equal" if difference.is_equal else f"{difference.psnr_db:.1f} dB",
            )
    console.print(table)
    wanted = f"within {verification.tolerance:g}" if verification.tolerance else "bit-identical"
    dtype, plain = verification.configuration["dtype"], verification.configuration["reference_dtype"]
    against = "" if dtype == plain else f" ({dtype} against {plain})"
    verdict = "passed" if verification.passed else "FAILED"
    reason = "" if verification.is_sensitive else "; the damaged control was not noticed, so this proves nothing"
    console.print(f"{verdict}: {'' if verification.is_same else 'not '}{wanted}{against}{reason}")

"""`penstock inspect`: what a model is, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.tree import Tree

from penstock.cli.options import command
from penstock.config import SourceConfig
from penstock.profile import ComponentProfile, Fact, Profile

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@command
def inspect(
    model: Annotated[str, typer.Argument(help="demo, a folder saved by diffusers, or a hub id.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of tables.")] = False,
    source: SourceConfig,
) -> None:
    """Say what a model is: components, roles, stacks of blocks, bytes, and where each fact came from."""
    from dataclasses import asdict

    from penstock.models.profiler import inspect as profile_of

    profile = profile_of(model, **asdict(source))
    if as_json:
        typer.echo(profile.to_json())
    else:
        show(profile, Console())


def show(profile: Profile, console: Console) -> None:
    """Print a profile as a tree: pipeline, components, stacks."""
    tree = Tree(
        f"[bold]{profile.pipeline_class}[/] ({profile.model}): makes {profile.output}s; {size(profile.num_bytes)} "
        f"of weights; width and height in multiples of {profile.size_multiple}"
    )
    for component in profile.components:
        _add_component(tree, component)
    parts = ", ".join(f"{name} ({cls})" for name, cls in profile.parts.items() if cls != "NoneType")
    tree.add(f"other parts: {parts or 'none'}")
    tree.add(f"takes: {', '.join(profile.arguments)}")
    for note in profile.notes:
        tree.add(f"note: {note}")
    console.print(tree, highlight=False)


def size(num_bytes: int) -> str:
    """Bytes for people: three digits and a binary unit."""
    value, unit = float(num_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _add_component(tree: Tree, component: ComponentProfile) -> None:
    branch = tree.add(
        f"[bold]{component.name}[/] {component.role}, {size(component.num_bytes)} "
        f"{' '.join(component.dtype_bytes)}, {component.class_name}"
    )
    branch.add(f"[dim]role known from {source_of(component.fact)}[/]")
    for stack in component.stacks:
        bounds = dict.fromkeys(map(size, (min(stack.block_bytes), max(stack.block_bytes))))
        branch.add(
            f"{stack.path}: {stack.num_blocks} x {stack.block_class}, {' to '.join(bounds)} each, "
            f"{size(stack.num_bytes)} in all [dim]({source_of(stack.fact)})[/]"
        )
    if component.stacks:
        branch.add(f"outside the stacks: {size(component.other_bytes)}")
    if component.declares:
        branch.add(f"[dim]its class brings along {' '.join(component.declares)}[/]")


def source_of(fact: Fact) -> str:
    """A fact's origin and detail, for people."""
    return f"{fact.origin}: {fact.detail}"

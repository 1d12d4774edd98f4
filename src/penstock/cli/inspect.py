"""`penstock inspect`: what a model is, without loading it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from penstock.bytesize import format_bytes
from penstock.cli.options import command
from penstock.config import LoadConfig, SourceConfig
from penstock.plan import Plan
from penstock.profile import ComponentProfile, Fact, Profile


@command
def inspect(
    model: Annotated[str, typer.Argument(help="demo, demo-video, a folder saved by diffusers, or a hub id.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of tables.")] = False,
    load: LoadConfig,
) -> None:
    """Say what a model is: components, roles, stacks of blocks, bytes, and where each fact came from.

    With options of placement, such as --offload or --max-weight-memory, also where its weights would go.
    """
    from penstock.models.profiler import inspect as profile_of

    profile = profile_of(model, **_chosen(load, SourceConfig))
    plan = plan_of(model, load) if _chosen(load, LoadConfig) != _chosen(LoadConfig(), LoadConfig) else None
    if as_json:
        placement = {"plan": asdict(plan)} if plan is not None else {}
        typer.echo(json.dumps({**json.loads(profile.to_json()), **placement}))
    else:
        show(profile, Console())
        if plan is not None:
            show_plan(plan, Console())


def plan_of(model: str, load: LoadConfig) -> Plan:
    """Where the weights of a model would go, from the headers of its files."""
    from penstock.engine.build import prepare

    return prepare(model, load).plan


def _chosen(load: LoadConfig, group: type[SourceConfig]) -> dict[str, Any]:
    """The options of a group; of `LoadConfig` those that it adds to `SourceConfig`."""
    source = {item.name for item in fields(SourceConfig)}
    names = source if group is SourceConfig else {item.name for item in fields(group)} - source
    return {name: getattr(load, name) for name in names}


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan as a table: one row per component."""
    table = Table("component", "weights", "on the device while it runs", "blocks resident", "streamed", "slots")
    for part in plan.components:
        row = (part.num_bytes, part.device_bytes)
        counts = (part.num_resident, part.num_streamed, part.num_slots)
        table.add_row(f"{part.name} ({part.role})", *map(format_bytes, row), *map(str, counts))
    console.print(table)
    console.print(
        f"offload {plan.offload} on {plan.device} ({plan.reason}): at most {format_bytes(plan.promised_bytes)} of "
        f"{format_bytes(plan.weight_bytes)} on the device; least possible {format_bytes(plan.least_bytes)} "
        f"({plan.least_bytes} bytes)",
        highlight=False,
    )


def show(profile: Profile, console: Console) -> None:
    """Print a profile as a tree: pipeline, components, stacks."""
    tree = Tree(
        f"[bold]{profile.pipeline_class}[/] ({profile.model}): makes {profile.output}s; "
        f"{format_bytes(profile.num_bytes)} of weights; width and height in multiples of {profile.size_multiple}"
    )
    for component in profile.components:
        _add_component(tree, component)
    parts = ", ".join(f"{name} ({cls})" for name, cls in profile.parts.items() if cls != "NoneType")
    tree.add(f"other parts: {parts or 'none'}")
    tree.add(f"takes: {', '.join(profile.arguments)}")
    for note in profile.notes:
        tree.add(f"note: {note}")
    console.print(tree, highlight=False)


def _add_component(tree: Tree, component: ComponentProfile) -> None:
    branch = tree.add(
        f"[bold]{component.name}[/] {component.role}, {format_bytes(component.num_bytes)} "
        f"{' '.join(component.dtype_bytes)}, {component.class_name}"
    )
    branch.add(f"[dim]role known from {source_of(component.fact)}[/]")
    for stack in component.stacks:
        bounds = dict.fromkeys(map(format_bytes, (min(stack.block_bytes), max(stack.block_bytes))))
        branch.add(
            f"{stack.path}: {stack.num_blocks} x {stack.block_class}, {' to '.join(bounds)} each, "
            f"{format_bytes(stack.num_bytes)} in all [dim]({source_of(stack.fact)})[/]"
        )
    if component.stacks:
        branch.add(f"outside the stacks: {format_bytes(component.other_bytes)}")
    if component.declares:
        branch.add(f"[dim]its class brings along {' '.join(component.declares)}[/]")


def source_of(fact: Fact) -> str:
    """A fact's origin and detail, for people."""
    return f"{fact.origin}: {fact.detail}"

"""From a model to its Profile, without loading weights.

Owns the assembly of discovery, stacks and bytes into a `Profile`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from penstock.config import SourceConfig
from penstock.errors import NotAPipelineError
from penstock.models.components import Component, Discovery, discover
from penstock.models.folder import open_folder
from penstock.models.ledger import Ledger
from penstock.models.sizes import call_defaults, output_kind, size_multiple
from penstock.models.skeleton import Skeleton, build_skeleton
from penstock.models.stacks import Stack, find_stacks
from penstock.profile import ComponentProfile, Profile, StackProfile

_PLANS = (
    "_layerwise_offload_blocks_attrs",
    "_hsdp_shard_conditions",
    "_sp_plan",
    "_cp_plan",
    "_tp_plan",
    "_repeated_blocks",
    "_no_split_modules",
    "_keep_in_fp32_modules",
)


def inspect(model: Any, **options: Any) -> Profile:
    """Say what a model is: components, roles, stacks, bytes, and where each fact came from.

    Args:
        model: a built-in name, a folder saved by diffusers, a hub id, or a pipeline object.
        **options: fields of `SourceConfig` (`variant`, `revision`, `trust_remote_code`); not with an object.

    Returns:
        The profile; printable, and JSON both ways.

    Raises:
        UsageError: for a name that leads to no pipeline.
        WeightsError: for weight files that are missing, truncated or corrupt.
        DeclarationError: for a declaration that is not true of its class.

    Cost: for a folder, its configs, tokenizers and safetensors headers are read, and no weights; a hub id
    that is not in the cache is downloaded first.
    """
    config = SourceConfig.of(**options)
    if isinstance(model, (str, Path)):
        return profile_skeleton(build_skeleton(open_folder(model, config), config))
    if isinstance(model, (nn.Module, type)) or not hasattr(model, "__dict__"):
        raise NotAPipelineError(
            f"a {type(model).__name__} is no pipeline. Give a name, a folder, a hub id, or a pipeline object."
        )
    return profile_object(model)


def profile_skeleton(skeleton: Skeleton) -> Profile:
    """The profile of a folder; bytes are those of its files."""
    discovery = discover(skeleton.pipeline)
    ledger = Ledger()
    for name in skeleton.classes:
        ledger.add(getattr(skeleton.pipeline, name), skeleton.indexes.get(name))
    return _profile(skeleton.folder.model, skeleton.pipeline, discovery, ledger, skeleton.notes)


def profile_object(pipeline: Any, model: str = "object") -> Profile:
    """The profile of a pipeline object; bytes are those in memory."""
    discovery = discover(pipeline)
    return _profile(model, pipeline, discovery, Ledger(), ())


def _profile(model: str, pipeline: Any, discovery: Discovery, ledger: Ledger, notes: tuple[str, ...]) -> Profile:
    for component in discovery.components:
        ledger.add(component.module, None)  # what the folder has entered already stays as it is
    return Profile(
        model=model,
        pipeline_class=type(pipeline).__name__,
        output=output_kind(type(pipeline)),
        components=tuple(_component(component, discovery, ledger) for component in discovery.components),
        parts={name: type(part).__name__ for name, part in discovery.parts.items()},
        arguments=call_defaults(type(pipeline)),
        size_multiple=size_multiple(pipeline),
        notes=(*discovery.notes, *notes),
    )


def _component(component: Component, discovery: Discovery, ledger: Ledger) -> ComponentProfile:
    module = component.module
    stacks = find_stacks(module) if component.role in ("denoiser", "encoder") else ()
    inner = [other.module for other in discovery.components if _contains(module, other.module)]
    return ComponentProfile(
        name=component.name,
        class_name=type(module).__name__,
        role=component.role,
        fact=component.fact,
        num_bytes=ledger.num_bytes(module, without=inner),
        dtype_bytes=ledger.dtype_bytes(module, without=inner),
        stacks=tuple(_stack(stack, ledger) for stack in stacks),
        declares=tuple(name for name in _PLANS if getattr(module, name, None)),
    )


def _contains(module: nn.Module, other: nn.Module) -> bool:
    return other is not module and any(inner is other for inner in module.modules())


def _stack(stack: Stack, ledger: Ledger) -> StackProfile:
    classes = dict.fromkeys(type(block).__name__ for block in stack.blocks)
    return StackProfile(
        path=stack.path,
        block_class="|".join(classes),
        block_bytes=tuple(ledger.num_bytes(block) for block in stack.blocks),
        fact=stack.fact,
    )

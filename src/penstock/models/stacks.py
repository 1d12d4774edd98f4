"""The stacks of blocks in a module: what layerwise offload and sharding take apart.

Owns the search: declared attributes first, then diffusers' and transformers' metadata, then structure.
Does not know bytes on disk or roles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from penstock.errors import DeclarationError
from penstock.models.components import declared_paths, resolve_path
from penstock.profile import Fact

_METADATA = ("_repeated_blocks", "_no_split_modules")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # have no forward: they hold blocks and are none
_LEAST_SHARE = 0.05  # of a module's parameters: a shorter list is an embedder or a head, not a stack


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other: the path from the component, the blocks, and why."""

    path: str
    blocks: tuple[nn.Module, ...]
    fact: Fact


def find_stacks(module: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a module, from the most specific source that knows any.

    What metadata names is completed by what structure shows beside it: a refiner that no list mentions is a
    stack all the same.

    Raises:
        DeclarationError: for a declared stack that does not exist, is no module, or is empty.

    Warns:
        DeprecationWarning: for the single-attribute spelling `_layerwise_offload_blocks_attr`.
    """
    paths, attribute = _declared_paths(module)
    if paths:
        fact = Fact(origin="declared", detail=f"{type(module).__name__}.{attribute}")
        return tuple(Stack(path, _declared_blocks(module, path), fact) for path in dict.fromkeys(paths))
    for attribute in _METADATA:
        named = _stacks_where(module, partial(_is_made_of, _class_names(module, attribute)))
        if named:
            fact = Fact(origin="diffusers", detail=f"{attribute} of {type(module).__name__}")
            stacks = [Stack(path, blocks, fact) for path, blocks in named]
            return _in_order(module, [*stacks, *_structural(module, stacks)])
    return _structural(module, [])


def _declared_paths(module: nn.Module) -> tuple[list[str], str]:
    several = declared_paths(type(module), "_layerwise_offload_blocks_attrs")
    if several:
        return several, "_layerwise_offload_blocks_attrs"
    single = getattr(type(module), "_layerwise_offload_blocks_attr", None)
    if not single:
        return [], ""
    warnings.warn(
        f"{type(module).__name__}._layerwise_offload_blocks_attr is deprecated; "
        f"declare _layerwise_offload_blocks_attrs = [{single!r}] instead.",
        DeprecationWarning,
        stacklevel=3,
    )
    return [single], "_layerwise_offload_blocks_attr"


def _declared_blocks(module: nn.Module, path: str) -> tuple[nn.Module, ...]:
    value = resolve_path(module, path)
    if not isinstance(value, (nn.Module, list, tuple)):
        raise DeclarationError(
            f"{type(module).__name__} declares the stack {path!r}, a {type(value).__name__}. "
            "A stack is a module or a list of modules."
        )
    if isinstance(value, nn.ModuleDict):
        value = list(value.values())
    blocks = tuple(value) if isinstance(value, Iterable) else (value,)
    if not blocks:
        raise DeclarationError(f"{type(module).__name__} declares the stack {path!r}, which is empty.")
    for block in blocks:
        if not isinstance(block, nn.Module):
            raise DeclarationError(
                f"{type(module).__name__} declares the stack {path!r}, which holds a {type(block).__name__}."
            )
    return blocks


def _class_names(module: nn.Module, attribute: str) -> set[str]:
    names: set[str] = set()
    for inner in module.modules():
        value = getattr(inner, attribute, None)
        names.update([value] if isinstance(value, str) else value or ())
    return names


def _classes(blocks: tuple[nn.Module, ...]) -> set[str]:
    return {type(block).__name__ for block in blocks}


def _is_made_of(names: set[str], blocks: tuple[nn.Module, ...]) -> bool:
    return _classes(blocks) <= names


def _is_uniform(blocks: tuple[nn.Module, ...]) -> bool:
    return len(blocks) > 1 and len(_classes(blocks)) == 1 and not isinstance(blocks[0], _CONTAINERS)


def _stacks_where(
    module: nn.Module, is_stack: Callable[[tuple[nn.Module, ...]], bool], path: str = ""
) -> list[tuple[str, tuple[nn.Module, ...]]]:
    """The outermost lists of modules that satisfy `is_stack`, in order of definition."""
    found = []
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        blocks = tuple(child) if isinstance(child, (nn.ModuleList, nn.Sequential)) else ()
        if blocks and is_stack(blocks):
            found.append((child_path, blocks))
        else:
            found.extend(_stacks_where(child, is_stack, child_path))
    return found


def _structural(module: nn.Module, known: list[Stack]) -> tuple[Stack, ...]:
    """Uniform lists with a fair share of the parameters, that neither hold a known block nor lie in one."""
    total = _num_parameters([module])
    inside = {id(inner) for stack in known for block in stack.blocks for inner in block.modules()}
    stacks = []
    for path, blocks in _stacks_where(module, partial(_is_apart, inside)):
        share = _num_parameters(blocks) / max(total, 1)
        if share >= _LEAST_SHARE:
            detail = f"{len(blocks)} modules of class {type(blocks[0]).__name__}, {share:.0%} of the parameters"
            stacks.append(Stack(path, blocks, Fact(origin="structure", detail=detail)))
    return tuple(stacks)


def _is_apart(inside: set[int], blocks: tuple[nn.Module, ...]) -> bool:
    return _is_uniform(blocks) and not any(id(inner) in inside for block in blocks for inner in block.modules())


def _in_order(module: nn.Module, stacks: list[Stack]) -> tuple[Stack, ...]:
    order = {name: number for number, (name, _) in enumerate(module.named_modules())}
    return tuple(sorted(stacks, key=lambda stack: order[stack.path]))


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in _parameters(modules))


def _parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

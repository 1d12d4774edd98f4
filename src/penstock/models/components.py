"""Which modules a pipeline consists of, and what each is for.

Owns the walk from a pipeline object to its modules (declared paths, `components`, nested pipelines, plain
attributes) and the choice of roles. Does not know bytes, files or blocks.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from penstock.errors import DeclarationError
from penstock.models.protocols import SupportsModuleOffload
from penstock.profile import Fact, Role

_DECLARED: tuple[tuple[str, Role], ...] = (
    ("_dit_modules", "denoiser"),
    ("_encoder_modules", "encoder"),
    ("_vae_modules", "vae"),
    ("_resident_modules", "resident"),
)

_CLASS_HOMES: tuple[tuple[str, Role], ...] = (
    ("diffusers.models.autoencoders.", "vae"),
    ("diffusers.models.vq_model", "vae"),
    ("diffusers.models.transformers.", "denoiser"),
    ("diffusers.models.unets.", "denoiser"),
    ("diffusers.models.controlnets.", "denoiser"),
)
"""Where in diffusers a class of each role is defined."""

_TIME_ARGUMENTS = {"timestep", "timesteps", "time", "t", "sigma", "sigmas", "r_timestep"}
_ENCODER_ARGUMENTS = {"input_ids", "pixel_values", "input_features"}


@dataclass(frozen=True)
class Component:
    """A module of a pipeline: its attribute path, itself, its role, and why."""

    name: str
    module: nn.Module
    role: Role
    fact: Fact


@dataclass(frozen=True)
class Discovery:
    """All modules and other parts of a pipeline, and what was odd about its declarations."""

    components: tuple[Component, ...]
    parts: dict[str, object]
    notes: tuple[str, ...]

    def by_role(self, role: Role) -> tuple[Component, ...]:
        """The components of one role, in order."""
        return tuple(component for component in self.components if component.role == role)


def discover(pipeline: object) -> Discovery:
    """Find every module of a pipeline once, declared ones first, each with its role.

    Args:
        pipeline: a diffusers pipeline, or any object that holds modules or such pipelines as attributes.

    Raises:
        DeclarationError: for a declared path that does not exist; it names the class and the path.

    Warns:
        UserWarning: for a declared path that leads to something other than an `nn.Module`; it is skipped.
    """
    found: dict[int, Component] = {}
    notes: list[str] = []
    for component in _declared(pipeline, notes):
        found.setdefault(id(component.module), component)
    parts: dict[str, object] = {}
    for name, value, owner in _attributes(pipeline, "", set()):
        if not isinstance(value, nn.Module):
            parts[name] = value
        elif id(value) not in found:
            role, fact = _role(name, value, owner)
            found[id(value)] = Component(name, value, role, fact)
    return Discovery(_with_denoiser(list(found.values()), parts), parts, tuple(notes))


def resolve_path(root: object, path: str) -> object:
    """Follow a dotted attribute path; a number selects from a list.

    Raises:
        DeclarationError: naming the class of `root`, the path, and where it ends.
    """
    value: Any = root
    for depth, part in enumerate(path.split(".")):
        try:
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            done = ".".join(path.split(".")[:depth]) or "itself"
            raise DeclarationError(
                f"{type(root).__name__} declares {path!r}, but {done} ({type(value).__name__}) has no {part!r}. "
                "Correct the declaration on the class."
            ) from None
    return value


def _declared(pipeline: object, notes: list[str]) -> Iterator[Component]:
    if not isinstance(pipeline, SupportsModuleOffload):
        return
    owner = type(pipeline).__name__
    for attribute, role in _DECLARED:
        for path in declared_paths(type(pipeline), attribute):
            module = resolve_path(pipeline, path)
            if module is None:
                continue  # an optional component that this pipeline was built without
            if not isinstance(module, nn.Module):
                note = f"{owner}.{attribute} names {path!r}, a {type(module).__name__} and no module: skipped"
                warnings.warn(note, UserWarning, stacklevel=4)
                notes.append(note)
                continue
            yield Component(path, module, role, Fact(origin="declared", detail=f"{owner}.{attribute}"))


def declared_paths(owner: type, attribute: str) -> list[str]:
    """The attribute paths that a class declares under a name; none where it does not.

    Raises:
        DeclarationError: for anything but a list of texts.
    """
    paths = getattr(owner, attribute, None) or []
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise DeclarationError(
            f"{owner.__name__}.{attribute} is {paths!r}, not a list of attribute paths. Correct it on the class."
        )
    return list(paths)


def _attributes(owner: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, object, object]]:
    """Yield (path, value, owning pipeline) of what a pipeline holds; nested pipelines are entered once."""
    seen.add(id(owner))
    registered = getattr(owner, "components", None)
    values = dict(registered) if isinstance(registered, dict) else {}
    for name, value in vars(owner).items():
        if name not in values and (isinstance(value, nn.Module) or _is_pipeline(value) or not registered):
            values[name] = value
    for name, value in values.items():
        if _is_pipeline(value):
            if id(value) not in seen:
                yield from _attributes(value, f"{prefix}{name}.", seen)
        elif isinstance(value, nn.Module) or (value is not None and not name.startswith("_")):
            yield prefix + name, value, owner


def _is_pipeline(value: object) -> bool:
    return not isinstance(value, (type, nn.Module)) and isinstance(getattr(value, "components", None), dict)


def _role(name: str, module: nn.Module, pipeline: object) -> tuple[Role, Fact]:
    for base in type(module).__mro__:
        for home, role in _CLASS_HOMES:
            if f"{base.__module__}.".startswith(home) or base.__module__ == home:
                return role, Fact(origin="diffusers", detail=f"{base.__name__} is defined in {base.__module__}")
    return _role_by_order(name, pipeline) or _role_by_structure(module)


def _with_denoiser(components: list[Component], parts: dict[str, object]) -> tuple[Component, ...]:
    """Where a pipeline has a scheduler and no denoiser was found, the largest module of unknown use is it."""
    unknown = [component for component in components if component.role == "resident"]
    if not unknown or "scheduler" not in parts or any(component.role == "denoiser" for component in components):
        return tuple(components)
    largest = max(unknown, key=lambda component: sum(p.numel() for p in component.module.parameters()))
    if largest.fact.origin == "declared":
        return tuple(components)
    fact = Fact(origin="structure", detail="the largest module of unknown use, in a pipeline with a scheduler")
    promoted = replace(largest, role="denoiser", fact=fact)
    return tuple(promoted if component is largest else component for component in components)


def _role_by_order(name: str, pipeline: object) -> tuple[Role, Fact] | None:
    """Before the denoiser in diffusers' own offload order: an encoder; after it: decodes, as a VAE does."""
    order = (getattr(pipeline, "model_cpu_offload_seq", None) or "").split("->")
    own_name = name.rpartition(".")[2]
    denoisers = [i for i, other in enumerate(order) if _is_denoiser(getattr(pipeline, other, None))]
    if own_name not in order or not denoisers:
        return None
    fact = Fact(origin="diffusers", detail=f"{type(pipeline).__name__}.model_cpu_offload_seq")
    return ("encoder" if order.index(own_name) < denoisers[0] else "vae"), fact


def _is_denoiser(value: object) -> bool:
    return isinstance(value, nn.Module) and _is_stepped(value)


def _is_stepped(module: nn.Module) -> bool:
    return bool(_TIME_ARGUMENTS & _forward_arguments(module))


def _forward_arguments(module: nn.Module) -> frozenset[str]:
    forward = getattr(type(module), "forward", None)
    if "forward" in vars(module) or not inspect.isfunction(forward):  # a library's own, or a compiled one
        return frozenset(inspect.signature(module.forward).parameters)
    return _arguments(forward)


@functools.lru_cache(256)
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _role_by_structure(module: nn.Module) -> tuple[Role, Fact]:
    arguments = _forward_arguments(module)
    if callable(getattr(module, "decode", None)):
        return "vae", Fact(origin="structure", detail="has a decode method")
    if _is_stepped(module):
        return "denoiser", Fact(origin="structure", detail="forward takes a timestep")
    if any(base.__module__.startswith("transformers.") for base in type(module).__mro__):
        return "encoder", Fact(origin="structure", detail="a transformers model")
    if _ENCODER_ARGUMENTS & arguments:
        return "encoder", Fact(origin="structure", detail="forward takes tokens or pixels")
    return "resident", Fact(origin="structure", detail="neither timestep, decode, tokens nor pixels")

"""What others have put on a module: hooks, caches, replaced forwards, attention processors that keep something.

    attachments_of(transformer)     # (Attachment("blocks.0", "FirstBlockCache of diffusers", {DECIDES, ...}), ...)

Owns where such things are found and what each may do. Has no opinion: what goes with which feature is decided by
others. penstock's own hooks and forwards are not foreign, and are left out.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from torch import nn

from penstock.models.callables import habits_of, home_of, is_of_library, keeps_state, name_of, plain_function


class Trait(Enum):
    """What an attachment does that a feature may not survive."""

    MOVES_WEIGHTS = "moves weights by itself"
    CASTS_WEIGHTS = "casts weights by itself"
    SPLITS_WORK = "splits the work over ranks by itself"
    DECIDES = "decides, or computes, from all the values that it sees"
    PAIRS_SAMPLES = "takes a batch for pairs of predictions"
    SHARES_STATE = "keeps state that the calls of one step share"
    EXCHANGES = "may exchange with other ranks by itself"
    LOOKS_ACROSS_TOKENS = "looks from one token to another"
    SKIPS_BLOCKS = "skips single blocks"
    KEEPS_RESULTS = "keeps what blocks return"


@dataclass(frozen=True)
class Attachment:
    """Something that others have put on a module.

    Attributes:
        path: of the module, from the component; empty for the component itself.
        what: it is, in words for the user.
        traits: what it does.
        remedy: what takes it away.
    """

    path: str
    what: str
    traits: frozenset[Trait]
    remedy: str = "take it off"


UNKNOWN = frozenset({Trait.DECIDES, Trait.SHARES_STATE, Trait.EXCHANGES, Trait.KEEPS_RESULTS})
"""What code that nobody knows, and that keeps something from call to call, may do."""
_WEIGHTS = frozenset({Trait.MOVES_WEIGHTS})
_NOTHING: frozenset[Trait] = frozenset()

_HOOKS: dict[str, tuple[str, frozenset[Trait]]] = {
    **dict.fromkeys(
        ("GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook"),
        ("group offloading", _WEIGHTS),
    ),
    "LayerwiseCastingHook": ("layerwise casting", frozenset({Trait.CASTS_WEIGHTS})),
    "PeftInputAutocastDisableHook": ("layerwise casting of adapters", _NOTHING),
    **dict.fromkeys(
        ("FBCHeadBlockHook", "FBCBlockHook"), ("FirstBlockCache", frozenset({Trait.DECIDES, Trait.KEEPS_RESULTS}))
    ),
    **dict.fromkeys(
        ("SeaCacheRootHook", "SeaCacheLeaderBlockHook", "SeaCacheBlockHook", "SeaCachePostNormHook"),
        ("SeaCache", frozenset({Trait.DECIDES, Trait.KEEPS_RESULTS})),
    ),
    **dict.fromkeys(("MagCacheHeadHook", "MagCacheBlockHook"), ("MagCache", frozenset({Trait.KEEPS_RESULTS}))),
    "TaylorSeerCacheHook": ("TaylorSeer", _NOTHING),
    **dict.fromkeys(("TextKVCacheTransformerHook", "TextKVCacheBlockHook"), ("TextKVCache", _NOTHING)),
    "PyramidAttentionBroadcastHook": ("PyramidAttentionBroadcast", frozenset({Trait.SHARES_STATE})),
    **dict.fromkeys(
        ("FasterCacheDenoiserHook", "FasterCacheBlockHook"),
        ("FasterCache", frozenset({Trait.SHARES_STATE, Trait.PAIRS_SAMPLES})),
    ),
    "AttentionProcessorSkipHook": ("LayerSkip", frozenset({Trait.LOOKS_ACROSS_TOKENS})),
    "FeedForwardSkipHook": ("LayerSkip", _NOTHING),
    "TransformerBlockSkipHook": ("LayerSkip", frozenset({Trait.SKIPS_BLOCKS})),
    "SmoothedEnergyGuidanceHook": ("SmoothedEnergyGuidance", frozenset({Trait.LOOKS_ACROSS_TOKENS})),
    **dict.fromkeys(
        ("ContextParallelSplitHook", "ContextParallelGatherHook"),
        ("context parallelism of diffusers", frozenset({Trait.SPLITS_WORK})),
    ),
}
"""diffusers' hooks by class. What keeps its state by `cache_context` keeps it apart for each prediction."""
_EVERYTHING = frozenset(Trait)
_METHODS = (types.FunctionType, types.MethodType, partial)
_OFF = {
    "group offloading": "load the pipeline again without enable_group_offload()",
    "layerwise casting": "load the pipeline again without enable_layerwise_casting()",
    "FirstBlockCache": "call disable_cache()",
    "SeaCache": "call disable_cache()",
    "MagCache": "call disable_cache()",
    "PyramidAttentionBroadcast": "call disable_cache()",
    "FasterCache": "call disable_cache()",
}


def attachments_of(module: nn.Module) -> tuple[Attachment, ...]:
    """What others have put on a module and all within it, that does something which a feature may not survive.

    Cost: microseconds per module, and a reading of each function that is neither the class's nor a library's.
    """
    home = _top(type(module).__module__)
    found = (one for path, part in module.named_modules() for one in _on(path, part, home))
    return tuple(one for one in dict.fromkeys(found) if one.traits)


def marks_of(module: nn.Module) -> list[Any]:
    """What `attachments_of` depends on, to be compared with `==`: equal marks, equal attachments.

    Cost: below a microsecond per module.
    """
    marks: list[Any] = []
    kinds: dict[type, None] = {}
    parts: list[nn.Module | None] = [module]
    for part in parts:  # which grows
        if part is None:
            continue
        state, kind = part.__dict__, part.__class__
        kinds[kind] = None
        marks += (kind, len(state))
        if "forward" in state:
            marks.append(state["forward"])
        if "_hf_hook" in state:
            marks.append(state["_hf_hook"])
        if "_diffusers_hook" in state:
            marks += state["_diffusers_hook"].hooks.values()
        if "processor" in state:
            marks.append(type(state["processor"]))
        if state["_forward_hooks"]:
            marks += state["_forward_hooks"].values()
        if state["_forward_pre_hooks"]:
            marks += state["_forward_pre_hooks"].values()
        if children := state["_modules"]:
            parts += children.values()
    for kind in kinds:
        marks += (kind.forward, kind.__call__)
    return marks


class Attached:
    """What is on one module now, looked for again only where something was put on or taken off.

    Args:
        module: to look at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._marks: list[Any] | None = None
        self._found: tuple[Attachment, ...] = ()

    def now(self) -> tuple[Attachment, ...]:
        """What is on it.

        Cost: that of `marks_of`; where these changed, that of `attachments_of`.
        """
        marks = marks_of(self._module)
        if marks != self._marks:
            self._found, self._marks = attachments_of(self._module), marks
        return self._found


def _on(path: str, module: nn.Module, home: str) -> Iterator[Attachment]:
    state = vars(module)
    if state.get("_hf_hook") is not None:
        kind = type(state["_hf_hook"]).__name__
        remedy = "call remove_all_hooks() on the pipeline, or load it again without device_map and CPU offload"
        yield Attachment(path, f"a hook of accelerate ({kind})", _WEIGHTS, remedy)
    registry = state.get("_diffusers_hook")
    for name, hook in registry.hooks.items() if registry is not None else ():
        yield _of_hook(path, name, hook)
    yield from _of_forward(path, module, registry, home)
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        yield from _of_function(path, "a forward hook", hook, module, is_hook=True)
    processor = state.get("processor") or module._modules.get("processor")
    if processor is not None:
        yield from _of_processor(path, processor)


def _of_hook(path: str, name: str, hook: Any) -> Attachment:
    kind = type(hook)
    if not kind.__module__.startswith("diffusers.hooks.") or kind.__name__ not in _HOOKS:
        return Attachment(path, f"a hook of an unknown kind ({name}: {kind.__module__}.{kind.__name__})", _EVERYTHING)
    what, traits = _HOOKS[kind.__name__]
    if getattr(hook, "is_guidance_distilled", False):
        traits -= {Trait.PAIRS_SAMPLES}
    if 0.0 < getattr(hook, "dropout", 1.0) < 1.0:  # it draws
        traits |= {Trait.SHARES_STATE, Trait.DECIDES}
    if kind.__name__ == "AttentionProcessorSkipHook" and not hook.skip_attention_scores:
        traits -= {Trait.LOOKS_ACROSS_TOKENS}
    return Attachment(path, f"{what} of diffusers ({kind.__name__})", traits, _OFF.get(what, "take it off"))


def _of_forward(path: str, module: nn.Module, registry: Any, home: str) -> Iterator[Attachment]:
    """A forward, or another method, that is not the one which the module's class was written with."""
    for name, value in vars(module).items():
        method = _behind_hooks(value, registry) if name == "forward" else value
        if not isinstance(method, _METHODS) and not (name == "forward" and callable(method)):
            continue
        is_shadowing = hasattr(type(module), name) and not _is_own_method(method, module, name)
        if is_shadowing and _top(home_of(method)) != "penstock":
            yield from _of_function(path, f"a replaced {name}", method, module)
    for name in ("__call__", "forward"):
        kind = next(kind for kind in type(module).__mro__ if name in vars(kind))
        function = vars(kind)[name]
        if not _is_written_in(kind, function, name):
            yield from _of_function(path, f"a replaced {kind.__name__}.{name}", function, module)
            return
    if not is_of_library(function) and (_top(kind.__module__) != home or _overrides_library(kind)):
        yield from _of_function(path, f"a block of another class ({kind.__name__})", function, module)


def _overrides_library(kind: type) -> bool:
    """Whether a class stands for one of a model library, and brings a forward of its own."""
    bases = [base for base in kind.__mro__[1:] if "forward" in vars(base)]
    return any(_top(base.__module__) in ("diffusers", "transformers") for base in bases)


def _behind_hooks(forward: Any, registry: Any) -> Any:
    """What a module's own forward was before diffusers' hooks, whose classes are known, were put around it."""
    known = [reference.forward for reference in registry._fn_refs] if registry is not None else []
    function = plain_function(forward)
    if not known or not getattr(function, "__qualname__", "").startswith("HookRegistry.register_hook."):
        return forward
    first = registry._fn_refs[0]
    return first.original_forward if first.original_forward is not None else first.forward


def _is_own_method(method: Any, module: nn.Module, name: str) -> bool:
    """Whether this is the class's own, bound: what remains where a hook was taken off."""
    return (
        isinstance(method, types.MethodType)
        and method.__self__ is module
        and method.__func__ is getattr(type(module), name, None)
    )


def _is_written_in(kind: type, function: Any, name: str) -> bool:
    """Whether a function stands in the body of a class, or was put around one there by the class's own library."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return True  # a class of another language, or an abstract one
    if kind is nn.Module:
        return is_of_library(function)
    if function.__code__.co_qualname == f"{kind.__qualname__}.{name}":
        return function.__globals__.get("__name__") == kind.__module__ or is_of_library(function)
    return is_of_library(function) and (function.__closure__ is None or _closes_over_its_own(kind, function))


def _closes_over_its_own(kind: type, function: types.FunctionType) -> bool:
    """Whether a library's decorator is around a function of the class's own module, and of no other."""
    inner = getattr(function, "__wrapped__", None)
    held = [cell.cell_contents for cell in function.__closure__ or () if _holds_function(cell)]
    return all(is_of_library(one) or _top(home_of(one)) == _top(kind.__module__) for one in (inner, *held) if one)


def _holds_function(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, types.FunctionType)
    except ValueError:  # nothing yet
        return False


def _of_function(
    path: str, what: str, function: Any, module: nn.Module, *, is_hook: bool = False
) -> Iterator[Attachment]:
    if is_hook and is_of_library(function):
        return
    habits = habits_of(function, module)
    traits = UNKNOWN if habits.keeps_state else frozenset({Trait.DECIDES}) if habits.looks_across else _NOTHING
    if not (is_hook and habits.only_watches):
        yield Attachment(path, f"{what} ({name_of(function)})", traits)


def _of_processor(path: str, processor: Any) -> Iterator[Attachment]:
    kind = type(processor)
    if kind.__module__.startswith(("diffusers.models.", "penstock.")):
        return
    if keeps_state(processor):
        traits = frozenset({Trait.SHARES_STATE, Trait.DECIDES, Trait.LOOKS_ACROSS_TOKENS})
        what = f"an attention processor that keeps state ({kind.__module__}.{kind.__name__})"
        yield Attachment(path, what, traits, "set another processor")


def _top(name: str) -> str:
    return name.partition(".")[0]

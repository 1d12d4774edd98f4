"""Sequence parallelism as a model's own class declares it: where its tokens are split, and where they are gathered.

A plan does not name attention. While a forward runs, an attention whose tensors are as long as a rank's pieces sees the
tokens of all ranks (`penstock.distributed.sequence.lengths`); any other runs as ever.

Owns the hooks. Does not know the notation's rules, or how attention is carried out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from penstock.distributed.forwards import wrap_forward
from penstock.distributed.mesh import Mesh
from penstock.distributed.sequence import dispatch
from penstock.distributed.sequence.attention import Call, Sight
from penstock.distributed.sequence.lengths import Joins, MeasuredStreams
from penstock.distributed.sequence.plan import (
    AnySequenceParallelInput,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    inputs_of,
    outputs_of,
    validate_sp_plan,
)
from penstock.errors import DeclarationError, GenerationError
from penstock.models.rows.row import Layout
from penstock.undo import Undo

_MOST_AXES = 4
"""Most columns that ids of tokens have: time, height, width, and one more."""


def check_declared(denoiser: nn.Module, plan: SequenceParallelModelPlan) -> None:
    """Whether a plan fits a denoiser, found out before its weights are needed.

    Args:
        denoiser: a model, perhaps without storage (on the meta device).
        plan: what is split and gathered.

    Raises:
        ValueError: for a plan that breaks a rule of the notation.
        DeclarationError: for a module, parameter or shard_group that there is not.
    """
    validate_sp_plan(plan)
    _places(denoiser, plan)


def apply_declared(denoiser: nn.Module, plan: SequenceParallelModelPlan, mesh: Mesh) -> Undo:
    """Split the sequences of a denoiser over the ranks of a mesh, where a plan says.

    Args:
        denoiser: an unmodified model.
        plan: what is split and gathered; see `penstock.distributed.sequence.plan`.
        mesh: whose `ring` and `ulysses` axes are used.

    Returns:
        What takes it back.

    Raises:
        ValueError: for a plan that breaks a rule of the notation.
        DeclarationError: for a module, parameter or shard_group that there is not.

    Cost: one all-gather per gathered tensor, and per attention over cut tokens what `attend` says. The first forward of
        each set of shapes is watched for how tokens are joined.
    """
    validate_sp_plan(plan)
    places = _places(denoiser, plan)
    at_once = plan.get("")
    with Undo() as undo:
        if mesh["sequence"].size == 1:
            return undo
        streams = MeasuredStreams(mesh["sequence"], mesh["ulysses"], mesh["ring"], type(denoiser).__name__)
        split = _Split(denoiser, streams)
        undo.add(partial(dispatch.uninstall, split))
        dispatch.install(split)
        undo.add(split.undo.run)
        split.install(places, frozenset(at_once if isinstance(at_once, dict) else ()))
    return undo


class _Split:
    """The hooks on one denoiser, and what they know of the forward that runs."""

    def __init__(self, denoiser: nn.Module, streams: MeasuredStreams) -> None:
        self.denoiser = denoiser
        self.streams = streams
        self.given: dict[str, Any] = {}  # what the denoiser was called with
        self.groups: dict[str, str] = {}  # streams by shard_group
        self.joins: dict[Any, Joins] = {}  # by the shapes that the denoiser was called with
        self.watching: Joins | None = None
        self.looking: dispatch.Look | None = None
        self.unseen: set[tuple[int, int]] = set()  # lengths of attention that saw nothing cut, while something was
        self.has_seen = False
        self.warned: set[str] = set()
        self.is_running = False
        self.undo = Undo()

    def install(self, places: Sequence[tuple[str, nn.Module, Any]], split_at_once: frozenset[Any]) -> None:
        """Put the hooks in place."""
        begin = partial(self.begin, split_at_once=split_at_once)
        self.undo.add(self.denoiser.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for path, module, spec in places:
            if isinstance(spec, dict):
                taken = {name: inputs_of(value) for name, value in spec.items() if isinstance(name, str)}
                given = {index: value for index, value in spec.items() if isinstance(index, int)}
                cut_taken = self.hook(module, partial(self.cut_taken, path=path, spec=taken))
                self.undo.add(module.register_forward_pre_hook(cut_taken, with_kwargs=True).remove)
                cut_given = self.hook(module, partial(self.cut_given, path=path, spec=given))
                self.undo.add(module.register_forward_hook(cut_given, with_kwargs=True).remove)
            else:
                gather = self.hook(module, partial(self.gather, path=path, specs=outputs_of(spec)))
                self.undo.add(module.register_forward_hook(gather).remove)
        self.undo.add(self.denoiser.register_forward_hook(self.end, always_call=True).remove)
        self.undo.add(wrap_forward(self.denoiser, self.run).run)

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that acts while the denoiser runs: another model may run modules of it, and those run whole."""
        return hook if module is self.denoiser else partial(self.while_running, hook)

    def while_running(self, hook: Callable[..., Any], *given: Any) -> Any:
        """What a hook gives; nothing where the denoiser does not run."""
        return hook(*given) if self.is_running else None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the place of the denoiser's forward: attention asks us, and how tensors are joined is seen."""
        self.looking = dispatch.Look(self.look)
        self.is_running = True
        try:
            with self.watching or nullcontext(), dispatch.attending(self.looking):
                return forward(*args, **kwargs)
        finally:
            self.is_running = False

    def begin(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], split_at_once: frozenset[Any]
    ) -> None:
        """Before the denoiser: forget the forward before."""
        self.looking = self.watching = None
        self.given = _named(denoiser, args, kwargs)
        tensors = {name: value for name, value in self.given.items() if isinstance(value, Tensor)}
        shapes = tuple((name, value.shape) for name, value in tensors.items())
        joins = self.joins.get(shapes)
        if joins is None:
            joins = self.joins[shapes] = self.watching = Joins()
        whole = {value.shape[1] for name, value in tensors.items() if value.ndim == 3 and name not in split_at_once}
        self.streams.begin(whole, joins.found)
        self.groups.clear()
        self.unseen.clear()
        self.has_seen = False

    def look(self, call: Call) -> Sight | None:
        """What an attention sees; None where it runs as ever."""
        if not self.streams.num_open:
            return None
        lengths = call.query.shape[1], call.key.shape[1]
        queries, keys = map(self.streams.seen_as, lengths)
        if queries is None and keys is None:
            self.unseen.add(lengths)
            return None
        self.has_seen = True
        if keys is None:
            return None  # cut queries and whole keys: nobody else's tokens are needed
        return Sight(self.streams, queries or (self.streams.keep(lengths[0]),), keys)

    def end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        """After the denoiser: an error where no attention saw what was cut."""
        self.given = {}
        if output is None:
            return
        if self.unseen and not self.has_seen:
            told = ", ".join(f"{queries} by {keys}" for queries, keys in sorted(self.unseen))
            raise GenerationError(
                f"attention of {type(denoiser).__name__} saw {told} tokens, and none that were cut over "
                f"{self.streams.group.size} ranks: each rank would see its own alone. The plan has to split the tokens "
                "that attention is given; declare text that goes before them as SequenceParallelPartialInput."
            )
        is_cut = not all(map(self.streams.is_whole, self.streams.lengths))
        was_attended = self.looking is not None and self.looking.was_attended
        if is_cut and not was_attended and not any(map(dispatch.may_skip, denoiser.modules())):
            raise GenerationError(
                f"no attention of {type(denoiser).__name__} went through diffusers' backends or torch's "
                f"scaled_dot_product_attention, while its tokens were cut over {self.streams.group.size} ranks: each "
                "rank saw its own alone. Set the processors that the class has by default, and replace attention "
                "functions before the denoiser is split."
            )

    def cut_taken(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        path: str,
        spec: Mapping[str, Sequence[AnySequenceParallelInput]],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a module: split what it takes."""
        given = _named(module, args, kwargs)
        cut = {
            name: self._cut_all(given[name], inputs, f"{path}.{name}", given)
            for name, inputs in spec.items()
            if name in given
        }
        positional = [cut.get(name, value) for name, value in zip(given, args, strict=False)]
        return (*positional, *args[len(positional) :]), {name: cut.get(name, value) for name, value in kwargs.items()}

    def cut_given(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        path: str,
        spec: Mapping[int, AnySequenceParallelInput],
    ) -> Any:
        """After a module: split what it returned."""
        if not spec:
            return None
        given = _named(module, args, kwargs)
        parts = _parts(output, path)
        for index, one in spec.items():
            if index >= len(parts):
                raise ValueError(f"{path} gave {len(parts)} tensors, and output {index} is to be split. Count from 0.")
            parts[index] = self._cut(parts[index], one, f"output {index} of {path}", given)
        return _like(output, parts)

    def gather(
        self, module: nn.Module, args: Any, output: Any, path: str, specs: Sequence[SequenceParallelOutput]
    ) -> Any:
        """After a module: gather what it returned."""
        parts = _parts(output, path)
        if len(parts) != len(specs):
            raise ValueError(f"{path} gave {len(parts)} tensors, and {len(specs)} are to be gathered. Declare as many.")
        joined = [self._join(part, spec, path) for part, spec in zip(parts, specs, strict=True)]
        self.streams.close(name for _, names in joined for name in names)
        return _like(output, [part for part, _ in joined])

    def _cut_all(
        self, value: Any, inputs: Sequence[AnySequenceParallelInput], name: str, given: Mapping[str, Any]
    ) -> Any:
        if value is None:
            return None
        several = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(several) != len(inputs) or not all(isinstance(part, Tensor) for part in several if part is not None):
            raise ValueError(
                f"{name} is {type(value).__name__} of {len(several)}, and the plan splits {len(inputs)} tensors. "
                "Declare one input for a tensor, and for several a list of as many."
            )
        cut = [
            part if part is None else self._cut(part, one, name, given)
            for part, one in zip(several, inputs, strict=True)
        ]
        return type(value)(cut) if isinstance(value, (list, tuple)) else cut[0]

    def _cut(self, tensor: Tensor, spec: AnySequenceParallelInput, name: str, given: Mapping[str, Any]) -> Tensor:
        if not self._fits(tensor, spec.expected_dims, f"{name} is not split"):
            return tensor
        length = tensor.shape[spec.split_dim]
        if isinstance(spec, SequenceParallelInput):
            names: tuple[str, ...] = (self.streams.open(length, spec.auto_pad),)
            if spec.shard_group is not None:
                self.groups[spec.shard_group] = names[0]
        else:
            text_length = self._text_length(spec.text_len_source, name, given)
            if not 0 <= text_length < length:
                raise ValueError(
                    f"{name} has {length} tokens, and {text_length} of text leave none. Mend text_len_source."
                )
            names = self.streams.open_after(text_length, length - text_length)
        return self.streams.cut(tensor, Layout(names, spec.split_dim), name)

    def _text_length(self, source: str | int, name: str, given: Mapping[str, Any]) -> int:
        if isinstance(source, int):
            return source
        value = given.get(source, self.given.get(source))
        if isinstance(value, int):
            return value
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} begins with as many tokens of text as {source!r} has, which is {type(value).__name__} here. "
                "Name a tensor that the module or the model is called with, or give a number."
            )
        if value.ndim == 2:  # a mask is (batch, tokens); ids and rotations are (tokens, ...)
            is_mask = not value.is_floating_point() and value.shape[1] > _MOST_AXES
            return value.shape[1] if is_mask else value.shape[0]
        return value.shape[min(value.ndim - 1, 1)]

    def _join(self, tensor: Tensor, spec: SequenceParallelOutput, path: str) -> tuple[Tensor, tuple[str, ...]]:
        """The whole tensor and the streams in it; none where nothing of it was cut in this forward."""
        is_cut = self.streams.lengths if spec.shard_group is None else spec.shard_group in self.groups
        if not is_cut or not self._fits(tensor, spec.expected_dims, f"{path} is not gathered"):
            return tensor, ()
        size = tensor.shape[spec.gather_dim]
        if spec.shard_group is None:
            names = self.streams.joined_as(size)
        else:
            names = (self.groups[spec.shard_group],)
            piece = self.streams.piece(names[0])
            if size != piece:
                raise GenerationError(
                    f"{path} gave {size} tokens, and shard_group {spec.shard_group!r} has {piece} on each of "
                    f"{self.streams.group.size} ranks. Split and gather the same tokens."
                )
        return self.streams.join(tensor, Layout(names, spec.gather_dim)), names

    def _fits(self, tensor: Tensor, expected_dims: int | None, consequence: str) -> bool:
        if expected_dims is None or tensor.ndim == expected_dims:
            return True
        if consequence not in self.warned:
            self.warned.add(consequence)
            note = (
                f"{consequence}: it has {tensor.ndim} dims in place of {expected_dims}. Every rank keeps what it has."
            )
            warnings.warn(note, UserWarning, stacklevel=2)
        return False


def _places(denoiser: nn.Module, plan: SequenceParallelModelPlan) -> list[tuple[str, nn.Module, Any]]:
    """(path, module, what is declared for it), checked against the modules' signatures."""
    places: list[tuple[str, nn.Module, Any]] = []
    groups: set[str | None] = {None}
    for path, spec in plan.items():
        for module in _modules(denoiser, path):
            places.append((path or type(denoiser).__name__, module, spec))
            if isinstance(spec, dict):
                _check_names(denoiser, path, module, [name for name in spec if isinstance(name, str)])
        if isinstance(spec, dict):
            groups.update(getattr(one, "shard_group", None) for value in spec.values() for one in inputs_of(value))
    for path, spec in plan.items():
        for output in outputs_of(spec):
            if output.shard_group not in groups:
                raise DeclarationError(
                    f"{type(denoiser).__name__} gathers shard_group {output.shard_group!r} at {path!r}, and splits no "
                    "such group. Give an input the same shard_group."
                )
    return places


def _modules(denoiser: nn.Module, path: str) -> list[nn.Module]:
    owner = type(denoiser).__name__
    if path.split(".").count("*") > 1:
        raise DeclarationError(f"{owner} declares {path!r}, which has more than one '*'. Write a path for each stack.")
    modules = [denoiser]
    for part in path.split(".") if path else ():
        if part == "*":
            if not isinstance(modules[0], nn.ModuleList):
                kind = type(modules[0]).__name__
                raise DeclarationError(
                    f"{owner} declares {path!r}: '*' stands for the blocks of a ModuleList, not {kind}."
                )
            modules = list(modules[0])
            continue
        modules = [getattr(module, part, None) for module in modules]  # type: ignore[misc]
        if not all(isinstance(module, nn.Module) for module in modules):
            raise DeclarationError(f"{owner} declares {path!r}, and has no module {part!r} there. Mend the plan.")
    return modules


def _check_names(denoiser: nn.Module, path: str, module: nn.Module, names: Sequence[str]) -> None:
    parameters = inspect.signature(type(module).forward).parameters
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name in names:
        if name not in parameters and not takes_any:
            raise DeclarationError(
                f"{type(denoiser).__name__} splits {name!r} of {path!r}, and {type(module).__name__}.forward takes "
                f"{', '.join(list(parameters)[1:])}. Name one of these."
            )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, positional ones first and in order."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _parts(output: Any, path: str) -> list[Any]:
    parts = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, (list, tuple)) else []
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(
            f"{path} gave {type(output).__name__}: only tensors are split and gathered. Declare another module."
        )
    return parts


def _like(output: Any, parts: list[Any]) -> Any:
    return parts[0] if isinstance(output, Tensor) else parts if isinstance(output, list) else tuple(parts)

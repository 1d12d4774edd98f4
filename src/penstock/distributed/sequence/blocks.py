"""Sequence parallelism on an unmodified denoiser: its streams are cut at the first block and joined after the last.

Embedders and heads run on every rank. At each block the arguments that the class's row names are cut where they are
whole; the modules that it names as attention see all tokens (`penstock.distributed.sequence.attention`).

Owns the hooks. Does not know kernels, or where weights are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed.forwards import wrap_forward
from penstock.distributed.mesh import Mesh
from penstock.distributed.sequence import dispatch
from penstock.distributed.sequence.attention import Sight
from penstock.distributed.sequence.streams import Streams
from penstock.errors import ConfigError, GenerationError
from penstock.models.rows.row import Layout, Layouts, Row, StackRow
from penstock.models.rows.table import blocks_of, check_row, modules_of, reason_of, row_of
from penstock.undo import Undo

_Held = Layout | tuple[Layout, ...]


def check_sequence(denoiser: nn.Module, config: ParallelConfig) -> Row:
    """Whether the sequences of a denoiser can be split as configured, found out before its weights are needed.

    Args:
        denoiser: a model, perhaps without storage (on the meta device).
        config: of which the degrees of the sequence are used.

    Returns:
        The row of its class.

    Raises:
        ConfigError: for a class that cannot be split, or that has no row.
        DeclarationError: for a row that does not fit the class.
    """
    row, owner = row_of(denoiser), type(denoiser).__name__
    if row is None:
        reason = reason_of(denoiser)
        raise ConfigError(
            f"the sequence of {owner} cannot be split over {config.sequence_size} ranks: "
            + (f"{reason}. " if reason else "it has no row, 10 to 20 lines of data (docs/concepts/sequence.md). ")
            + "Use ulysses_degree=1 and ring_degree=1, and split guidance (cfg_parallel_size) or weights instead."
        )
    check_row(denoiser, row)
    return row


def apply_sequence(denoiser: nn.Module, row: Row, mesh: Mesh, others: Sequence[nn.Module] = ()) -> Undo:
    """Split the sequences of a denoiser over the ranks of a mesh.

    Args:
        denoiser: an unmodified model.
        row: which arguments carry which streams.
        mesh: whose `ring` and `ulysses` axes are used.
        others: models that run by themselves and may have modules in common with the denoiser, as a ControlNet of
            Z-Image has. There, these run whole.

    Returns:
        What takes it back.

    Raises:
        DeclarationError: for a row that does not fit the class.

    Cost: per forward one all-gather for each stream that leaves the last block, and per attention what `attend` says.
    """
    with Undo() as undo:
        if mesh["sequence"].size == 1:
            return undo
        streams = Streams(mesh["sequence"], mesh["ulysses"], mesh["ring"], row.whole, type(denoiser).__name__)
        split = _Split(denoiser, row, streams, others)
        undo.add(partial(dispatch.uninstall, split))
        dispatch.install(split)
        undo.add(split.undo.run)
        split.install()
    return undo


class _Split:
    """The hooks on one denoiser; they act while it runs, and not where another model runs a module of it."""

    def __init__(self, denoiser: nn.Module, row: Row, streams: Streams, others: Sequence[nn.Module]) -> None:
        self.denoiser = denoiser
        self.row = row
        self.streams = streams
        self.others = others
        self.num_running = 0  # calls of the denoiser; those of one step may take turns at its blocks
        self.is_cut = False  # whether blocks gave streams that were not joined
        self.looks: list[tuple[nn.Module, dispatch.Look]] = []
        self.undo = Undo()

    def install(self) -> None:
        """Put all hooks on."""
        row = self.row
        self.before(self.denoiser, self.begin)
        self.undo.add(self.denoiser.register_forward_hook(self.end, always_call=True).remove)
        for other in self.others:
            self.undo.add(other.register_forward_pre_hook(self.rest, prepend=True).remove)
        stacks = [(stack, blocks) for stack in row.stacks if (blocks := blocks_of(self.denoiser, stack))]
        for stack, blocks in stacks:
            is_final = stack is stacks[-1][0] and not row.ends
            for block in blocks:
                is_last = block is blocks[-1] and (is_final or stack.is_closed)
                self._hook_block(block, stack, is_last or stack.is_apart)
        for module, text in modules_of(self.denoiser, row.ends):
            self.before(module, partial(self.join_last, layout=Layout.of(text)))
        for module, text in modules_of(self.denoiser, row.between):
            layout = Layout.of(text)
            self.before(module, partial(self.join_first, layout=layout))
            self.after(module, partial(self.cut_again, layout=layout))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have a hook see the arguments of a module: always those of the denoiser, of others while that runs."""
        if module is not self.denoiser:
            hook = partial(self.while_running, hook)
        self.undo.add(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Have a hook see what a module returns while the denoiser runs."""
        self.undo.add(module.register_forward_hook(partial(self.while_running, hook)).remove)

    @property
    def is_running(self) -> bool:
        """Whether a call of the denoiser has begun and not ended."""
        return self.num_running > 0

    def while_running(self, hook: Callable[..., Any], *given: Any) -> Any:
        """What a hook gives; nothing where the denoiser does not run."""
        return hook(*given) if self.is_running else None

    def _hook_block(self, block: nn.Module, stack: StackRow, is_joined: bool) -> None:
        names = _parameters(block)
        takes = {name: _held(layouts) for name, layouts in stack.takes.items()}
        gives = [Layout.of(text) for text in stack.gives]
        self.before(block, partial(self.cut, takes=takes, names=names))
        self.after(block, partial(self.join, gives=gives, is_joined=is_joined))
        for path, module in block.named_modules():
            seen = self.row.streams_of(stack, path)
            if seen is not None and not all(map(self.streams.is_whole, seen[1])):
                sight = Sight(self.streams, *seen, self.row.masks)
                self.undo.add(wrap_forward(module, partial(self.attend, module, sight)).run)
                self.after(module, partial(self.check_attended, path=f"{stack.path}.*.{path}"))

    def begin(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the denoiser: refuse what the row refuses, and cut what is added between blocks."""
        self.looks.clear()
        self.streams.begin()
        self.is_cut = False
        self.num_running += 1
        names = _parameters(denoiser)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, reason in self.row.refuses.items():
            if given.get(name) is not None and given[name] is not False:
                raise GenerationError(
                    f"{self.streams.owner} was called with {name}, and {reason}. Leave it out, or use "
                    "ulysses_degree=1 and ring_degree=1."
                )
        residuals = {name: Layout.of(text) for name, text in self.row.residuals.items()}
        return self.cut(denoiser, args, kwargs, residuals, names)

    def end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        """After the denoiser: nothing may be left cut."""
        self.num_running = max(self.num_running - 1, 0)
        if self.is_cut and output is not None:
            raise GenerationError(
                f"the last block of {self.streams.owner} did not run, so that its tokens were left cut over "
                f"{self.streams.group.size} ranks. Use ulysses_degree=1 and ring_degree=1 where blocks are skipped."
            )

    def rest(self, *_: Any) -> None:
        """Before another model: the denoiser does not run, even where Ctrl-C has ended it, after which no hook runs."""
        self.num_running = 0

    def cut(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        takes: Mapping[str, _Held],
        names: Sequence[str],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a block: cut its arguments."""
        positional, kwargs = list(args), dict(kwargs)
        for name, held in takes.items():
            if name in kwargs:
                kwargs[name] = self._cut(kwargs[name], held, name)
            elif name in names and names.index(name) < len(positional):
                place = names.index(name)
                positional[place] = self._cut(positional[place], held, name)
        return tuple(positional), kwargs

    def _cut(self, value: Any, held: _Held, name: str) -> Any:
        if isinstance(value, (tuple, list)):
            layouts = held if isinstance(held, tuple) else (held,) * len(value)
            if len(layouts) != len(value):
                raise GenerationError(
                    f"{name} of {self.streams.owner} has {len(value)} parts, where its row knows {len(layouts)}. "
                    "Use ulysses_degree=1 and ring_degree=1."
                )
            return type(value)([self._cut(*part, name) for part in zip(value, layouts, strict=True)])
        layout = held[0] if isinstance(held, tuple) else held
        if isinstance(value, dict):
            return {key: self._cut(part, layout, name) for key, part in value.items()}
        if isinstance(value, Tensor):
            return self.streams.cut(value, layout, name)
        if type(value) is int:
            return self.streams.count(value, layout.streams[0], from_end=layout.dim == -1)
        return value

    def join(self, block: nn.Module, args: Any, output: Any, gives: Sequence[Layout], is_joined: bool) -> Any:
        """After a block: gather what it gives, where that is due."""
        self.is_cut = not is_joined
        if self.is_cut:
            return None
        if isinstance(output, Tensor):
            return self.streams.join(output, gives[0])
        joined = [
            self.streams.join(part, layout) if isinstance(part, Tensor) else part
            for part, layout in zip(output, gives, strict=True)
        ]
        return type(output)(joined)

    def join_first(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a module between blocks: gather its first argument."""
        if args:
            return (self.streams.join(args[0], layout), *args[1:]), kwargs
        name = _parameters(module)[0]
        return args, {**kwargs, name: self.streams.join(kwargs[name], layout)}

    def join_last(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a module behind the last block: gather its first argument, for good."""
        self.is_cut = False
        return self.join_first(module, args, kwargs, layout)

    def cut_again(self, module: nn.Module, args: Any, output: Tensor, layout: Layout) -> Tensor:
        """After a module between blocks."""
        return self.streams.cut(output, layout, "what runs between blocks")

    def attend(
        self, module: nn.Module, sight: Sight, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """In the place of the forward of a module that attends."""
        if not self.is_running:
            return forward(*args, **kwargs)
        look = dispatch.Look(sight)
        self.looks.append((module, look))
        with dispatch.attending(look):
            return forward(*args, **kwargs)

    def check_attended(self, module: nn.Module, args: Any, output: Any, path: str) -> None:
        """After a module that attends: it must have done so, or its tokens saw none of the other ranks'."""
        is_seen = bool(self.looks) and self.looks[-1][0] is module
        was_attended = is_seen and self.looks.pop()[1].was_attended
        if not was_attended and not dispatch.may_skip(module):
            raise GenerationError(
                f"{path} of {self.streams.owner} computed attention by {_processor_of(module)} over the tokens of one "
                f"of {self.streams.group.size} ranks: it went neither through diffusers' attention backends nor "
                "through torch's scaled_dot_product_attention. Set the processors that the class has by default, "
                "replace attention functions before the denoiser is split, or use ulysses_degree=1 and ring_degree=1."
            )


def _processor_of(module: nn.Module) -> str:
    return type(getattr(module, "processor", module)).__name__


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _held(layouts: Layouts) -> _Held:
    return Layout.of(layouts) if isinstance(layouts, str) else tuple(map(Layout.of, layouts))

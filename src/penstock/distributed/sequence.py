"""Sequence parallelism on an unmodified denoiser: its streams are cut at the first block and joined after the last.

Embedders and heads run on every rank. At each block the arguments that the class's row names are cut where they are
whole; the modules that it names as attention see all tokens (`penstock.distributed.attention`).

Owns the hooks. Does not know kernels, or where weights are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import Token
from functools import partial
from typing import Any

from torch import Tensor, nn

from penstock.distributed import dispatch
from penstock.distributed.attention import Sight
from penstock.distributed.mesh import Mesh
from penstock.distributed.streams import Streams
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout, Layouts, Row, StackRow
from penstock.models.rows.table import blocks_of
from penstock.undo import Undo


def apply_sequence(denoiser: nn.Module, row: Row, mesh: Mesh) -> Undo:
    """Split the sequences of a denoiser over the ranks of a mesh.

    Args:
        denoiser: an unmodified model.
        row: which arguments carry which streams.
        mesh: whose `ring` and `ulysses` axes are used.

    Returns:
        What takes it back.

    Raises:
        DeclarationError: for a row that does not fit the class.

    Cost: per forward one all-gather for each tensor that the last block gives, and per attention what `attend` says.
    """
    undo = Undo()
    if mesh["sequence"].size == 1:
        return undo
    dispatch.install()
    undo.add(dispatch.uninstall)
    split = _Split(denoiser, row, Streams(mesh["sequence"], mesh["ulysses"], mesh["ring"], row.whole))
    undo.add(split.remove)
    split.install()
    return undo


class _Split:
    """The hooks on one denoiser."""

    def __init__(self, denoiser: nn.Module, row: Row, streams: Streams) -> None:
        self.denoiser = denoiser
        self.row = row
        self.streams = streams
        self.is_apart = False  # whether streams are joined after every block of this forward
        self.is_cut = False  # whether blocks gave streams that were not joined
        self.tokens: list[tuple[nn.Module, Token[Sight | None]]] = []
        self.handles: list[Any] = []

    def install(self) -> None:
        row = self.row
        hook = self.denoiser.register_forward_pre_hook(self.begin, with_kwargs=True)
        self.handles += [hook, self.denoiser.register_forward_hook(self.end, always_call=True)]
        stacks = [(stack, blocks_of(self.denoiser, stack)) for stack in row.stacks]
        stacks = [(stack, blocks) for stack, blocks in stacks if blocks]
        for stack, blocks in stacks:
            for block in blocks:
                is_last = block is stacks[-1][1][-1]
                self._hook_block(block, stack, is_last or stack.is_apart)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook_block(self, block: nn.Module, stack: StackRow, is_joined: bool) -> None:
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        takes = {name: _layouts(layouts) for name, layouts in stack.takes.items()}
        gives = [Layout.of(text) for text in stack.gives]
        hook = partial(self.cut, takes=takes, names=names)
        self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.handles.append(block.register_forward_hook(partial(self.join, gives=gives, is_joined=is_joined)))
        for path, module in block.named_modules():
            seen = self.row.streams_of(path)
            if seen is not None:
                sight = Sight(self.streams, *seen)
                self.handles.append(module.register_forward_pre_hook(partial(self.look, sight=sight)))
                self.handles.append(module.register_forward_hook(self.look_away, always_call=True))

    def begin(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.look_away_from_all()
        self.streams.begin()
        self.is_cut = False
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, reason in self.row.refuses.items():
            if given.get(name) is not None and given[name] is not False:
                raise GenerationError(
                    f"{type(denoiser).__name__} was called with {name}, and {reason}. Leave it out, or use "
                    "ulysses_degree=1 and ring_degree=1."
                )
        self.is_apart = any(given.get(name) is not None for name in self.row.residuals)

    def end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        self.look_away_from_all()
        if self.is_cut and output is not None:
            raise GenerationError(
                f"the last block of {type(denoiser).__name__} did not run, so that its tokens were left cut over "
                f"{self.streams.group.size} ranks. Use ulysses_degree=1 and ring_degree=1 where blocks are skipped."
            )

    def cut(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        takes: Mapping[str, Sequence[Layout]],
        names: Sequence[str],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, kwargs = list(args), dict(kwargs)
        for name, layouts in takes.items():
            if name in kwargs:
                kwargs[name] = self._cut(kwargs[name], layouts, name)
            elif name in names and names.index(name) < len(positional):
                place = names.index(name)
                positional[place] = self._cut(positional[place], layouts, name)
        return tuple(positional), kwargs

    def _cut(self, value: Any, layouts: Sequence[Layout], name: str) -> Any:
        if isinstance(value, Tensor):
            return self.streams.cut(value, layouts[0], name)
        if isinstance(value, (tuple, list)):
            parts = [
                self.streams.cut(part, layout, name) if isinstance(part, Tensor) else part
                for part, layout in zip(value, layouts, strict=True)
            ]
            return type(value)(parts)
        return value

    def join(self, block: nn.Module, args: Any, output: Any, gives: Sequence[Layout], is_joined: bool) -> Any:
        self.is_cut = not (is_joined or self.is_apart)
        if self.is_cut:
            return None
        if isinstance(output, Tensor):
            return self.streams.join(output, gives[0])
        joined = [
            self.streams.join(part, layout) if isinstance(part, Tensor) else part
            for part, layout in zip(output, gives, strict=True)
        ]
        return type(output)(joined)

    def look(self, module: nn.Module, args: Any, sight: Sight) -> None:
        self.tokens.append((module, dispatch.attending(sight)))

    def look_away(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.tokens and self.tokens[-1][0] is module:
            dispatch.done_attending(self.tokens.pop()[1])

    def look_away_from_all(self) -> None:
        """After Ctrl-C: torch runs no hook after a forward that ended by it."""
        while self.tokens:
            dispatch.done_attending(self.tokens.pop()[1])


def _layouts(layouts: Layouts) -> list[Layout]:
    return [Layout.of(text) for text in ([layouts] if isinstance(layouts, str) else layouts)]

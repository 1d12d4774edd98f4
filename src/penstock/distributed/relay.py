"""A denoiser's streams on their way from stage to stage, point to point, and to all ranks in the end.

The values that a block takes and returns are real on one stage at a time, the *holder*; before the first block and
after the last one, on all. Before a block of another stage runs, the holder sends that stage what the block takes.
A head that tells dtypes and shapes goes ahead, so that nothing is guessed.

Owns what is exchanged, and when. Does not know which block belongs to which stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.errors import DeclarationError, GenerationError
from penstock.models.rows.row import Layout, StackRow

Values = list[Tensor | None]
"""Streams in the order in which a block returns them; None for one that a block drops, or that a call leaves out."""

HEAD_BYTES = 80
"""Bytes that are sent ahead of each stream."""

_DTYPES = tuple(sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str))
_COLUMNS = HEAD_BYTES // torch.int64.itemsize  # dtype, number of dims, size of each
_ABSENT = -1


class Relay:
    """The streams of one denoiser during its forward.

    Args:
        group: the ranks that hold its stages, in order.

    Attributes:
        holder: stage whose streams are real; None where all ranks' are.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.holder: int | None = None

    def begin(self) -> None:
        """A forward begins: what the denoiser was called with is real on all ranks."""
        self.holder = None

    def end(self) -> None:
        """A forward is over.

        Raises:
            GenerationError: where its last block did not run, so that only one stage has the result.
        """
        if self.holder is not None:
            raise GenerationError(
                f"a forward ended on stage {self.holder} of {self.group.size}: its last block did not run, and what "
                "comes after it would differ from rank to rank. Use pipeline_parallel_size=1 to leave out that block."
            )

    def cross(self, streams: Values, stage: int) -> Values:
        """What a block of a stage takes, on that stage; on the others `streams` as they are.

        Args:
            streams: what this rank would give the block.
            stage: that holds the block; all ranks name the same.

        Cost: where another stage is the holder, bytes of the streams and of their heads, between two ranks.
        """
        source, self.holder = self.holder, stage
        if source is None or source == stage:
            return streams
        if self.group.rank == source:
            self._send(streams, stage)
        if self.group.rank == stage:
            return self._receive(source, len(streams), _device(streams))
        return streams

    def spread(self, streams: Values) -> Values:
        """The holder's streams, on all ranks.

        Cost: bytes of the streams and of their heads, from one rank to all.
        """
        source, self.holder = self.holder, None
        if source is None:
            return streams
        is_source = self.group.rank == source
        head = _head(streams).to(_device(streams))
        described = self.group.broadcast(head, source).tolist()
        spread: Values = []
        for stream, (dtype, num_dims, *sizes) in zip(streams, described, strict=True):
            if dtype == _ABSENT:
                spread.append(None)
                continue
            if is_source:
                assert stream is not None
                self.group.broadcast(_content(stream), source)
                spread.append(stream)
            else:
                made = torch.empty(sizes[:num_dims], dtype=_DTYPES[dtype], device=head.device)
                self.group.broadcast(_content(made), source)
                spread.append(made)
        return spread

    def _send(self, streams: Values, stage: int) -> None:
        """Each is waited for: there is nothing else to do here until the last stage is through."""
        self.group.send(_head(streams).to(_device(streams)), stage).wait()
        for stream in streams:
            if stream is not None:
                self.group.send(_content(stream), stage).wait()

    def _receive(self, source: int, num_streams: int, device: torch.device) -> Values:
        head = torch.empty(num_streams, _COLUMNS, dtype=torch.int64, device=device)
        self.group.receive(head, source).wait()
        streams: Values = []
        for dtype, num_dims, *sizes in head.tolist():
            if dtype == _ABSENT:
                streams.append(None)
                continue
            stream = torch.empty(sizes[:num_dims], dtype=_DTYPES[dtype], device=device)
            self.group.receive(_content(stream), source).wait()
            streams.append(stream)
        return streams


class Gate:
    """Where streams enter and leave one block, on whichever stage it is.

    Args:
        relay: of the block's denoiser.
        stage: that holds the block.
        stack: what the block takes and gives.
        block: whose forward's parameters are read; it is not kept.
        is_last: whether the denoiser's stacks end with it.
    """

    def __init__(self, relay: Relay, stage: int, stack: StackRow, block: nn.Module, is_last: bool) -> None:
        self._relay = relay
        self._stage = stage
        self._is_last = is_last
        self._is_tuple = len(stack.gives) > 1
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        self._carriers = {name: names.index(name) for name in carriers(stack)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the block's forward, with real streams on the stage that holds the block."""
        args, kwargs = list(args), dict(kwargs)
        given = self._streams(args, kwargs)
        for (name, place), stream in zip(self._carriers.items(), self._relay.cross(given, self._stage), strict=True):
            if place < len(args):
                args[place] = stream
            elif name in kwargs or stream is not None:
                kwargs[name] = stream
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, output: Any) -> Any:
        """What the block returns; that of the last block is the same on all ranks."""
        if not self._is_last:
            return output
        return self._packed(self._relay.spread(list(output) if self._is_tuple else [output]))

    def placeholder(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What stands for a block's output on the ranks that do not hold it: the right shapes, and no numbers."""
        return self._packed([_unknown(stream) for stream in self._streams(args, kwargs)])

    def _streams(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Values:
        return [args[place] if place < len(args) else kwargs.get(name) for name, place in self._carriers.items()]

    def _packed(self, streams: Values) -> Any:
        return tuple(streams) if self._is_tuple else streams[0]


def carriers(stack: StackRow) -> tuple[str, ...]:
    """By what a stack's blocks give, in order: the argument that carries it into the next block.

    Raises:
        DeclarationError: for something that no argument carries.
    """
    found = []
    for text in stack.gives:
        layout = Layout.of(text)
        names = [name for name, taken in stack.takes.items() if isinstance(taken, str) and Layout.of(taken) == layout]
        if not layout.streams or not names:
            raise DeclarationError(
                f"{stack.path} give {text!r}, which no argument of theirs carries; so no other rank can go on from "
                "there. Name that argument in the row, or use pipeline_parallel_size=1."
            )
        found.append(names[0])
    return tuple(found)


def _unknown(stream: Tensor | None) -> Tensor | None:
    if stream is None:
        return None
    return torch.full_like(stream, torch.nan if stream.is_floating_point() or stream.is_complex() else 0)


def _head(streams: Values) -> Tensor:
    head = torch.full((len(streams), _COLUMNS), _ABSENT, dtype=torch.int64)
    for row, stream in zip(head, streams, strict=True):
        if stream is not None:
            described = [_DTYPES.index(stream.dtype), stream.ndim, *stream.shape]
            row[: len(described)] = torch.tensor(described)
    return head


def _content(stream: Tensor) -> Tensor:
    """A stream's bytes, which every backend can send; of a contiguous one a view."""
    return stream.detach().contiguous().view(-1).view(torch.uint8)


def _device(streams: Values) -> torch.device:
    return next(stream.device for stream in streams if stream is not None)

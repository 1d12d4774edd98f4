"""Streams of tokens, cut over the ranks of a sequence group: who holds which tokens of which stream.

A stream of S tokens on P ranks is cut into pieces of ceil(S / P), so that every rank holds as many; the last pieces
are filled up with copies of the last token. These pads are dropped inside of attention, and after the last block:
they never take part. Ranks are numbered `ring_rank * ulysses_degree + ulysses_rank`, so that the pieces of the ranks
that trade heads are neighbours, and the order of tokens is the plain one everywhere.

Owns the arithmetic of lengths, and cutting and joining. Does not know attention or modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from penstock.distributed.group import Group
from penstock.errors import GenerationError
from penstock.models.rows.row import Layout


class Streams:
    """The streams of one forward.

    Attributes:
        group: the ranks that a sequence is cut over, ring and ulysses together.
        ulysses: those that trade tokens for heads.
        ring: those that pass keys and values around.
        owner: name of the denoiser's class, for errors.
        lengths: tokens of each stream that was seen in this forward, before it was cut.
    """

    def __init__(
        self, group: Group, ulysses: Group, ring: Group, whole: Iterable[str] = (), owner: str = "this denoiser"
    ) -> None:
        self.group = group
        self.ulysses = ulysses
        self.ring = ring
        self.owner = owner
        self.lengths: dict[str, int] = {}
        self._whole = frozenset(whole)

    def begin(self) -> None:
        """Forget the lengths of the forward before."""
        self.lengths.clear()

    def is_whole(self, stream: str) -> bool:
        """Whether every rank holds all tokens of a stream."""
        return stream in self._whole

    def piece(self, stream: str) -> int:
        """Tokens in a rank's piece of a stream that is cut, pads included."""
        return -(-self.lengths[stream] // self.group.size)

    def local(self, stream: str) -> int:
        """Tokens of a stream in this rank's tensors, pads included."""
        return self.lengths[stream] if self.is_whole(stream) else self.piece(stream)

    def run(self, stream: str, ring_rank: int) -> tuple[int, int]:
        """First token and number of tokens, without pads, that a ring rank holds once heads were traded.

        What is whole on every rank counts as held by this rank alone.
        """
        length = self.lengths[stream]
        if self.is_whole(stream):
            return 0, length if ring_rank == self.ring.rank else 0
        width = self.piece(stream) * self.ulysses.size
        start = min(ring_rank * width, length)
        return start, min(length - start, width)

    def count(self, number: int, stream: str, from_end: bool = False) -> int:
        """How many of the first (or last) `number` tokens of a stream lie in this rank's tensors, pads included."""
        if self.is_whole(stream):
            return number
        if from_end:
            return self.piece(stream) - self.count(self.lengths[stream] - number, stream)
        piece = self.piece(stream)
        return min(max(number - self.group.rank * piece, 0), piece)

    def cut(self, tensor: Tensor, layout: Layout, name: str = "a tensor") -> Tensor:
        """This rank's part of a tensor that carries streams; as it is where it was cut before, or carries none.

        Args:
            tensor: whole, or cut before; or of size 1 along `layout.dim`, the same for all tokens.
            layout: the streams it carries. A stream that was not seen in this forward gets its length here.
            name: of the tensor, for the error.

        Raises:
            GenerationError: for a length that is neither that of whole nor of cut streams.
        """
        if not layout.streams or layout.num_dims not in (None, tensor.ndim):
            return tensor
        size = tensor.shape[layout.dim]
        if len(layout.streams) == 1:
            self.lengths.setdefault(layout.streams[0], size)
        lengths = self._lengths(layout, name)
        if size == sum(map(self.local, layout.streams)):
            return tensor  # cut before, and flowing from block to block; or too short for cutting to make a difference
        if size == sum(lengths):
            parts = zip(torch.split(tensor, lengths, layout.dim), layout.streams, strict=True)
            return _join([self._cut(part, stream, layout.dim) for part, stream in parts], layout.dim)
        if size == 1:
            return tensor
        raise GenerationError(
            f"{name} has {size} entries along dim {layout.dim}, where {'+'.join(layout.streams)} have {sum(lengths)}: "
            f"the row of {self.owner} does not fit this call. Run it with ulysses_degree=1 and ring_degree=1."
        )

    def join(self, tensor: Tensor, layout: Layout) -> Tensor:
        """The whole tensor, from this rank's part and the others'; the same on all ranks to the last bit.

        Cost: one all-gather; for streams that are whole one broadcast, as ring ranks add them up in other orders.
        """
        if not layout.streams or self.group.size == 1:
            return tensor
        if all(map(self.is_whole, layout.streams)):
            return tensor if self.ring.size == 1 else self.group.broadcast(tensor.contiguous().clone(), 0)
        widths = list(map(self.local, layout.streams))
        parts = [torch.split(part, widths, layout.dim) for part in self.group.all_gather(tensor)]
        joined = []
        for item, stream in enumerate(layout.streams):
            if self.is_whole(stream):
                joined.append(parts[0][item])
            else:
                pieces = torch.cat([part[item] for part in parts], layout.dim)
                joined.append(pieces.narrow(layout.dim, 0, self.lengths[stream]))
        return _join(joined, layout.dim)

    def _lengths(self, layout: Layout, name: str) -> list[int]:
        unseen = [stream for stream in layout.streams if stream not in self.lengths]
        if unseen:
            raise GenerationError(
                f"{name} carries {'+'.join(layout.streams)}, and the length of {unseen[0]} is not known yet. Name an "
                f"argument that carries it alone first in the row of {self.owner}."
            )
        return [self.lengths[stream] for stream in layout.streams]

    def _cut(self, tensor: Tensor, stream: str, dim: int) -> Tensor:
        if self.is_whole(stream):
            return tensor
        piece = self.piece(stream)
        start = self.group.rank * piece
        if start + piece <= tensor.shape[dim]:
            return tensor.narrow(dim, start, piece).contiguous()
        index = torch.arange(start, start + piece, device=tensor.device).clamp_(max=tensor.shape[dim] - 1)
        return tensor.index_select(dim, index)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

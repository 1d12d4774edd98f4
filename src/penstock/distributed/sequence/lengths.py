"""Streams that nobody named: those of one length are one stream, and attention's are told by how long its tensors are.

Where two lengths would look alike on a rank, and pads are allowed, pieces are made one token longer. In which order
streams lie in a joined tensor is seen when the denoiser joins them (`Joins`).

Owns which local length stands for which streams. Does not know modules or plans.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from penstock.distributed.group import Group
from penstock.distributed.sequence.streams import Streams
from penstock.errors import GenerationError

_WHOLE = " whole"
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Joins(TorchFunctionMode):
    """Notes which lengths are joined to which, in what order, while it is entered.

    Attributes:
        found: by length of a joined tensor, the lengths of its parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch; remember what it joined."""
        output = func(*args, **(kwargs or {}))
        if func in _CONCATENATIONS:
            self._note(*args, **(kwargs or {}))
        return output

    def _note(self, tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> None:
        dim = others.get("axis", dim)
        if len(tensors) < 2 or not all(isinstance(part, Tensor) and part.ndim > 2 for part in tensors):
            return
        if 0 < dim % tensors[0].ndim < tensors[0].ndim - 1:  # the batch is first, and features are last
            sizes = tuple(part.shape[dim] for part in tensors)
            self.found[sum(sizes)].add(sizes)


class MeasuredStreams(Streams):
    """The streams of one forward, by length.

    A stream that is cut is called by its length (`"64"`), one that stays whole `"7 whole"`.
    """

    def __init__(self, group: Group, ulysses: Group, ring: Group, owner: str = "this denoiser") -> None:
        super().__init__(group, ulysses, ring, owner=owner)
        self._pieces: dict[str, int] = {}
        self._open: set[str] = set()
        self._whole_lengths: frozenset[int] = frozenset()
        self._partial: set[tuple[str, ...]] = set()
        self._joins: dict[int, set[tuple[int, ...]]] = {}

    def begin(self, whole_lengths: Iterable[int] = (), joins: dict[int, set[tuple[int, ...]]] | None = None) -> None:
        """Forget the forward before.

        Args:
            whole_lengths: of streams that are known to stay whole.
            joins: what a `Joins` has found, or is about to.
        """
        super().begin()
        self._pieces.clear()
        self._open.clear()
        self._partial.clear()
        self._whole_lengths = frozenset(whole_lengths)
        self._joins = {} if joins is None else joins

    @property
    def num_open(self) -> int:
        """How many streams are cut and not yet joined."""
        return len(self._open)

    def is_whole(self, stream: str) -> bool:
        """Whether every rank holds all tokens of a stream."""
        return stream.endswith(_WHOLE)

    def piece(self, stream: str) -> int:
        """Tokens in a rank's piece of a stream that is cut, pads included."""
        return self._pieces[stream]

    def open(self, length: int, may_pad: bool) -> str:
        """The stream of a tensor of so many tokens that is about to be cut.

        Args:
            length: tokens in all.
            may_pad: whether pieces may hold pads, and so be longer than they must.

        Raises:
            ValueError: for a length that does not divide, where there may be no pads.
        """
        name, ranks = str(length), self.group.size
        if length % ranks and not may_pad:
            raise ValueError(
                f"{length} tokens do not divide over {ranks} ranks, and the plan does not allow to pad them. Declare "
                f"auto_pad=True, or give {length - length % ranks} or {-(-length // ranks) * ranks} tokens."
            )
        if name not in self.lengths:
            piece = -(-length // ranks)
            taken = self._whole_lengths.union(self._pieces.values())
            while may_pad and piece in taken:
                piece += 1
            self.lengths[name], self._pieces[name] = length, piece
        self._open.add(name)
        return name

    def keep(self, length: int) -> str:
        """The stream of so many tokens that every rank holds."""
        name = f"{length}{_WHOLE}"
        self.lengths[name] = length
        return name

    def open_after(self, text_length: int, length: int) -> tuple[str, ...]:
        """The streams of a tensor of text, which stays whole, and then tokens that are about to be cut."""
        names = (self.keep(text_length), self.open(length, may_pad=True))
        self._partial.add(names)
        return names

    def close(self, names: Iterable[str]) -> None:
        """Streams were joined: attention no longer sees them cut."""
        self._open.difference_update(names)

    def joined_as(self, length: int) -> tuple[str, ...]:
        """The streams of a local tensor that is to be joined.

        Raises:
            GenerationError: for a length that fits no stream that was cut, or several.
        """
        found: set[tuple[str, ...]] = {(name,) for name, piece in self._pieces.items() if piece == length}
        found |= {names for names in self._partial if sum(map(self.local, names)) == length}
        if len(found) == 1:
            return found.pop()
        if found:
            raise GenerationError(
                f"{length} tokens of {self.owner} are to be gathered, and {' and '.join(_told(found))} have as many on "
                f"each of {self.group.size} ranks. Name the one that is meant by a shard_group."
            )
        raise GenerationError(
            f"{length} tokens of {self.owner} are to be gathered, and no stream that was cut has as many on each of "
            f"{self.group.size} ranks; there are {self._told_pieces()}. Split and gather the same tokens."
        )

    def seen_as(self, length: int) -> tuple[str, ...] | None:
        """The streams of a tensor that attention was given; None where it is whole.

        Raises:
            GenerationError: for a length that may mean several things.
        """
        found = set(self._layouts(length))
        meanings = _told(found)
        if found and length in self._whole_lengths:
            meanings.append(f"{length} that every rank holds")
        if len(meanings) > 1:
            raise GenerationError(
                f"attention of {self.owner} was given {length} tokens on each of {self.group.size} ranks, which may be "
                f"{' or '.join(meanings)}: the plan does not name attention, and lengths are all there is to go by. "
                "Declare auto_pad=True, or change the size of the picture or the number of ranks."
            )
        if not found and self._is_sum(length):
            raise GenerationError(
                f"attention of {self.owner} was given {length} tokens on each of {self.group.size} ranks, as many as "
                f"several streams together ({self._told_pieces()}), and torch.cat did not join them: their order is "
                "not known. Join them by torch.cat, or declare them as one SequenceParallelPartialInput."
            )
        return found.pop() if found else None

    def _layouts(self, length: int) -> Iterator[tuple[str, ...]]:
        """Every way in which streams that are cut, alone or with others, have this length on a rank."""
        yield from ((name,) for name in self._open if self._pieces[name] == length)
        for names in self._partial:
            if self._open.intersection(names) and sum(map(self.local, names)) == length:
                yield names
        for sizes in self._joins.get(length, ()):
            for names in itertools.product(*map(self._meanings, sizes)):
                if self._open.intersection(names):
                    yield names

    def _meanings(self, size: int) -> list[str]:
        cut = [name for name in sorted(self._open) if self._pieces[name] == size]
        return cut if cut and size not in self._whole_lengths else [*cut, self.keep(size)]

    def _is_sum(self, length: int) -> bool:
        pieces = [self._pieces[name] for name in self._open]
        counts = range(2, len(pieces) + 1)
        return any(sum(some) == length for count in counts for some in itertools.combinations(pieces, count))

    def _told_pieces(self) -> str:
        return ", ".join(f"{piece} of {name}" for name, piece in self._pieces.items())


def _told(found: Iterable[tuple[str, ...]]) -> list[str]:
    return ["a piece of " + " + ".join(names) for names in sorted(found)]

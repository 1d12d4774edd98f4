"""A pipeline's call that several ranks make together: the same arguments, the same random numbers, one fate.

Owns the stock pipeline's `__call__` while it is split, and what is made equal before it. Does not know how the work
inside is split.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import nn
from torch.utils._pytree import tree_leaves

from penstock.distributed import parallel_state
from penstock.distributed.group import Group
from penstock.distributed.guidance.futures import wait
from penstock.distributed.guidance.rounds import rounds_of
from penstock.distributed.mesh import Mesh
from penstock.distributed.watch import current_watch
from penstock.engine.sharing import schedulers_that_wait
from penstock.errors import GenerationError, RequestError
from penstock.interception import intercept
from penstock.models.words import word_of
from penstock.undo import Undo

_CALLBACKS = ("callback_on_step_end", "callback")
_OF_DIFFUSERS = (
    PipelineCallback,
    MultiPipelineCallbacks,
)  # pipelines ask for their class, and all ranks call them alike


class SharedUnits(Protocol):
    """The units of weights that ranks hold together, as this rank fills them: all ranks do it in one order."""

    @property
    def num_fills(self) -> int:
        """Fills so far."""
        ...

    def last_fills(self) -> list[int]:
        """The numbers of the units that were filled last, the oldest first; as many as can be under way."""
        ...

    def catch_up(self, missing: Sequence[int]) -> None:
        """Fill these, and then begin anew with nothing on the device."""
        ...


class Meeting:
    """Where ranks come together again that share weights, and whose last call may have ended at different places.

    What one of them has asked for ahead of use takes all of them to bring, whoever has failed before.

    Args:
        mesh: whose `replica` axis holds the ranks that meet, and whose `shard` axis those that share.
        units: that they share; None where they share none, and nothing is exchanged.

    Attributes:
        is_apart: whether something is under way on this rank, or has failed, that may have ended elsewhere on others.
    """

    def __init__(self, mesh: Mesh, units: SharedUnits | None = None) -> None:
        self._replica, self._shard = mesh["replica"], mesh["shard"]
        self._units = units if self._shard.size > 1 else None
        self.is_apart = False

    def hold(self) -> None:
        """Bring all of them to where the farthest is. All ranks call it; their shards' channel may have work under way.

        Raises:
            GenerationError: on all ranks, where they are too far apart.

        Cost: one small exchange; another after a call that failed, and the weights come anew.
        """
        units = self._units
        if units is None:
            return
        recent = units.last_fills()
        own = torch.tensor([self._shard.ranks[0], units.num_fills, len(recent), self.is_apart])
        found = [part.tolist() for part in self._replica.all_gather(own)]
        most = [max(other[1:3] for other in found if other[0] == each[0]) for each in found]
        if any(each[3] or each[1] != num_fills for each, (num_fills, _) in zip(found, most, strict=True)):
            self._catch_up(units, recent, found, most)
        self.is_apart = False

    def _catch_up(self, units: SharedUnits, recent: list[int], found: list[list[int]], most: list[list[int]]) -> None:
        room = max(length for _, _, length, _ in found)
        told = self._replica.all_gather(torch.tensor([-1] * (room - len(recent)) + recent))
        if any(num_fills - each[1] > length for each, (num_fills, length) in zip(found, most, strict=True)):
            raise GenerationError(
                "an earlier call ended at places that are too far apart on ranks that share weights. Start the ranks "
                "again."
            )
        own = self._replica.rank
        farthest = next(rank for rank, each in enumerate(found) if [each[0], *each[1:3]] == [found[own][0], *most[own]])
        units.catch_up(told[farthest].tolist()[room - (most[own][0] - found[own][1]) :])


def apply_together(pipeline: Any, mesh: Mesh, meeting: Meeting | None = None) -> Undo:
    """Have the ranks that make one picture together call a pipeline as one.

    Before each call their generators get the state of the first rank's, the global ones of torch, Python and numpy
    included: every random draw is the one that a single rank would make. A rank that raises ends those that would
    wait for it. Inside, `mesh` is the one in use, and calls of denoisers are shared out (`guidance`).

    Args:
        pipeline: any callable object; its class stays.
        mesh: whose `replica` axis holds these ranks.
        meeting: is held before each call, of ranks that share weights.

    Returns:
        What takes it back.

    Raises:
        RequestError: (from the call, on every rank) where ranks are called with different arguments: numbers, texts,
            tensors, arrays and pictures by their contents, all else by its class.

    Cost: per call three small exchanges, four where weights are shared; tensors and pictures among the arguments are
    read once (`word_of`).
    """
    group = mesh["replica"]
    meeting = meeting or Meeting(mesh)
    if group.size == 1 or not callable(pipeline):
        return Undo()

    def call(execute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with current_watch(group.ranks) or nullcontext():
            _require_equal(group, args, kwargs)
            meeting.hold()
            _share_random_states(mesh, args, kwargs)
            meeting.is_apart = True
            waiting = schedulers_that_wait(pipeline) if shares_weights(mesh) else nullcontext()
            with waiting, parallel_state.using(mesh), rounds_of(mesh["cfg"]).run():
                result = execute(*args, **_seeing_callbacks(kwargs))
            result = wait(result)
            meeting.is_apart = False
            return result

    return intercept(pipeline, "__call__", call)


def shares_weights(mesh: Mesh) -> bool:
    """Whether ranks that make different calls of guidance hold weights together.

    Then a round is closed at each step, before anything else is gathered: a call that a rank makes for nothing comes
    where the others make theirs.
    """
    return len(set(mesh["cfg"].ranks) & set(mesh["shard"].ranks)) > 1


def apply_agreement(denoiser: nn.Module, mesh: Mesh) -> Undo:
    """Have ranks agree on each call of a denoiser that no call of its pipeline surrounds.

    Another pipeline with the same denoiser (`from_pipe`), or a program that calls it, exchanges with the other ranks as
    well: with different arguments there, it would make a picture of nobody's.

    Args:
        denoiser: whose forward takes other ranks.
        mesh: whose `replica` axis holds them.

    Returns:
        What takes the check away.

    Raises:
        RequestError: (from the call, on every rank) where ranks call it with different arguments.

    Cost: nothing within the pipeline's call; else one small exchange, and the arguments are read once.
    """
    undo = Undo()
    group = mesh["replica"]

    def agree(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not parallel_state.is_in_call(mesh):
            with current_watch(group.ranks) or nullcontext():
                _require_equal(group, args, kwargs)

    undo.add(denoiser.register_forward_pre_hook(agree, prepend=True, with_kwargs=True).remove)
    return undo


def _seeing_callbacks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """With callbacks that get tensors which are there on every rank, so that one rank may look at them alone."""
    found = {name: kwargs[name] for name in _CALLBACKS if callable(kwargs.get(name))}
    return {**kwargs, **{name: _seeing(call) for name, call in found.items() if not isinstance(call, _OF_DIFFUSERS)}}


def _seeing(callback: Any) -> Any:
    @functools.wraps(callback)
    def seeing(*args: Any, **kwargs: Any) -> Any:
        return callback(*wait(args), **wait(kwargs))

    return seeing


def _require_equal(group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text = "\n".join(_told((args, sorted(kwargs.items()))))
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    digests = [int(part) for part in group.all_gather(torch.tensor([digest]))]
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        raise RequestError(
            f"rank {other} of {group.size} was called with other arguments than rank 0, and they make one picture "
            f"together (this is rank {group.rank}: {', '.join(kwargs)}). Give every rank the same prompt, settings and "
            "pictures, and tensors that are drawn with the same seed."
        )


def _told(value: Any) -> Iterator[str]:
    """Words that tell calls apart; for what has none, and for devices, which may differ, the class."""
    if isinstance(value, Mapping):
        yield f"{len(value)} pairs"
        yield from (word for pair in value.items() for word in _told(pair))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} items"
        yield from (word for item in value for word in _told(item))
    else:
        word = None if isinstance(value, torch.device) else word_of(value)
        yield type(value).__name__ if word is None else repr(word)


def _share_random_states(mesh: Mesh, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give every generator that the call may draw from the state that it has on the first rank."""
    group = mesh["replica"]
    on_cuda = mesh.device_mesh is not None and mesh.device_mesh.device_type == "cuda"
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    own = (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if on_cuda else None,
        random.getstate(),
        np.random.get_state(),
        [generator.get_state() for generator in generators],
    )
    states = pickle.loads(_shared_bytes(group, pickle.dumps(own)))  # of this program's own making
    if group.rank == 0:
        return
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
    random.setstate(states[2])
    np.random.set_state(states[3])
    for generator, state in zip(generators, states[4], strict=True):
        generator.set_state(state)


def _shared_bytes(group: Group, own: bytes) -> bytes:
    """The first rank's bytes."""
    length = int(group.broadcast(torch.tensor([len(own)]), 0))
    packed = torch.frombuffer(bytearray(own.ljust(length)[:length]), dtype=torch.uint8)
    return bytes(group.broadcast(packed, 0).numpy())

"""A pipeline's call that several ranks make together: the same arguments, the same random numbers, one fate.

Owns the stock pipeline's `__call__` while it is split, and what is made equal before it. Does not know how the work
inside is split.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import msgspec
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
_PATIENCE_S = 20.0
"""How long a rank waits for others to make the same call by hand: long beside what computes, short beside a hang."""
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


def apply_agreement(component: nn.Module, mesh: Mesh, methods: Sequence[str] = ()) -> Undo:
    """Have ranks agree on each call of a split component that no call of its pipeline surrounds.

    Another pipeline with the same component (`from_pipe`), or a program that calls it, exchanges with the other ranks
    as well: with different arguments there, it would make a picture of nobody's.

    Args:
        component: a denoiser or a VAE, whose calls take other ranks.
        mesh: whose `replica` axis holds them.
        methods: of the component, that exchange; its forward where none is given.

    Returns:
        What takes the check away.

    Raises:
        RequestError: (from the call, on every rank) where ranks call it with different arguments.
        GenerationError: (from the call) where another rank does not call it within `_PATIENCE_S`.

    Cost: nothing within the pipeline's call; else some small messages, and the arguments are read once.
    """
    name = type(component).__name__
    with Undo() as undo:
        if not methods:

            def agree(_: nn.Module, args: Any, kwargs: Any) -> None:
                if not parallel_state.is_in_call(mesh):
                    with current_watch(mesh["replica"].ranks) or nullcontext():
                        _agree_by_hand(name, mesh, args, kwargs)

            undo.add(component.register_forward_pre_hook(agree, prepend=True, with_kwargs=True).remove)
        for method in methods:
            undo.wrap(component, method, functools.partial(_call_agreed, f"{name}.{method}", mesh))
    return undo


def _call_agreed(name: str, mesh: Mesh, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A method that exchanges, watched and agreed upon where no call of the pipeline is around it."""
    if parallel_state.is_in_call(mesh):
        return stock(*args, **kwargs)
    with current_watch(mesh["replica"].ranks) or nullcontext():
        _agree_by_hand(name, mesh, args, kwargs)
        with parallel_state.using(mesh):  # what it calls in turn has been agreed upon
            return stock(*args, **kwargs)


def _agree_by_hand(name: str, mesh: Mesh, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have the same arguments and the same random numbers on every rank; none waits long for one that does not come."""
    group = mesh["replica"]
    watch = current_watch(group.ranks)
    own = _digest((name, args, sorted(kwargs.items())))
    digests = [own] if watch is None else watch.gather(own, int, _PATIENCE_S)
    _refuse_different(group, digests, f"{name}({', '.join(kwargs) or 'of tensors'})")
    _share_random_states(mesh, args, kwargs)


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
    own = _digest((args, sorted(kwargs.items())))
    digests = [int(part) for part in group.all_gather(torch.tensor([own]))]
    _refuse_different(group, digests, ", ".join(kwargs))


def _digest(arguments: Any) -> int:
    """A number that tells calls apart by their arguments."""
    text = "\n".join(_told(arguments))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _refuse_different(group: Group, digests: Sequence[int], told: str) -> None:
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        raise RequestError(
            f"rank {other} of {group.size} was called with other arguments than rank 0, and they make one picture "
            f"together (this is rank {group.rank}: {told}). Give every rank the same prompt, settings and "
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
    states = _decode(_shared_bytes(group, msgspec.msgpack.encode(_random_states(generators, on_cuda))))
    if group.rank == 0:
        return
    torch.set_rng_state(_tensor(states.torch))
    if states.cuda is not None:
        torch.cuda.set_rng_state(_tensor(states.cuda))
    random.setstate(states.python)
    name, keys, position, has_gauss, gauss = states.numpy
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, gauss))
    for generator, state in zip(generators, states.generators, strict=True):
        generator.set_state(_tensor(state))


class _RandomStates(msgspec.Struct):
    """What the next random numbers of a process depend on."""

    torch: bytes
    cuda: bytes | None
    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, bytes, int, int, float]
    generators: list[bytes]


_decode = msgspec.msgpack.Decoder(_RandomStates).decode


def _random_states(generators: list[torch.Generator], on_cuda: bool) -> _RandomStates:
    name, keys, *rest = np.random.get_state(legacy=True)
    return _RandomStates(
        torch=bytes(torch.get_rng_state().numpy()),
        cuda=bytes(torch.cuda.get_rng_state().numpy()) if on_cuda else None,
        python=random.getstate(),
        numpy=(str(name), np.asarray(keys, dtype=np.uint32).tobytes(), *rest),
        generators=[bytes(generator.get_state().numpy()) for generator in generators],
    )


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _shared_bytes(group: Group, own: bytes) -> bytes:
    """The first rank's bytes."""
    length = int(group.broadcast(torch.tensor([len(own)]), 0))
    packed = torch.frombuffer(bytearray(own.ljust(length)[:length]), dtype=torch.uint8)
    return bytes(group.broadcast(packed, 0).numpy())

"""A pipeline's call that several ranks make together: the same arguments, the same random numbers, one fate.

Owns the stock pipeline's `__call__` while it is split, and what is made equal before it. Does not know how the work
inside is split.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from penstock.distributed.futures import wait
from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh
from penstock.distributed.rounds import rounds_of
from penstock.distributed.watch import current_watch
from penstock.errors import RequestError
from penstock.undo import Undo

_CALLBACK = "callback_on_step_end"
_TOLD = (str, int, float, bool, type(None))


def apply_together(pipeline: Any, mesh: Mesh) -> Undo:
    """Have the ranks that make one picture together call a pipeline as one.

    Before each call their generators get the state of the first rank's, the global ones of torch, Python and numpy
    included: every random draw is the one that a single rank would make. A rank that raises ends those that would
    wait for it.

    Args:
        pipeline: any callable object; its class is replaced by one of the same name.
        mesh: whose `replica` axis holds these ranks.

    Returns:
        What gives the class back.

    Raises:
        RequestError: (from the call, on every rank) where ranks are called with different arguments.

    Cost: per call three small exchanges.
    """
    undo = Undo()
    stock = type(pipeline)
    group = mesh["replica"]
    if group.size == 1 or not callable(pipeline):
        return undo

    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with current_watch(group.ranks) or nullcontext():
            _require_equal(group, args, kwargs)
            _share_random_states(group, args, kwargs)
            return _finished(mesh["cfg"], stock.__call__, self, *args, **_seeing_callback(kwargs))

    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    pipeline.__class__ = type(stock.__name__, (stock,), {**names, "__call__": call})
    undo.add(lambda: setattr(pipeline, "__class__", stock))
    return undo


def _finished(guidance: Group, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call, with nothing in it that other ranks have yet to send."""
    is_over = False
    try:
        result = call(*args, **kwargs)
        rounds_of(guidance).close()
        is_over = True
        return wait(result)
    finally:
        if not is_over:
            rounds_of(guidance).drop()


def _seeing_callback(kwargs: dict[str, Any]) -> dict[str, Any]:
    """With a callback that gets tensors which are there on every rank, so that one rank may look at them alone."""
    callback = kwargs.get(_CALLBACK)
    if not inspect.isfunction(callback):
        return kwargs

    @functools.wraps(callback)
    def seeing(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        return callback(pipeline, step, timestep, wait(tensors))

    return {**kwargs, _CALLBACK: seeing}


def _require_equal(group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text = "\n".join(_told((args, sorted(kwargs.items()))))
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    digests = [int(part) for part in group.all_gather(torch.tensor([digest]))]
    other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
    if other is not None:
        raise RequestError(
            f"rank {other} of {group.size} was called with other arguments than rank 0, and they make one picture "
            f"together (this is rank {group.rank}: {', '.join(kwargs)}). Give every rank the same prompt and settings."
        )


def _told(value: Any) -> Iterator[str]:
    """Words that tell calls apart: numbers and texts themselves, of all else its kind and size."""
    for leaf in tree_leaves(value, is_leaf=lambda node: node is None):
        if isinstance(leaf, _TOLD):
            yield repr(leaf)
        elif isinstance(leaf, torch.Tensor):
            yield f"{tuple(leaf.shape)} {leaf.dtype}"
        else:
            size = getattr(leaf, "size", None)  # of a picture; a function, of other things
            yield f"{type(leaf).__name__} {size if isinstance(size, tuple) else None}"


def _share_random_states(group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give every generator that the call may draw from the state that it has on the first rank."""
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    own = (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
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

"""The tiles of a VAE's own tiled encode and decode, spread over ranks; the picture is that of one rank, bit for bit.

Owns who computes which tile and how the results reach every rank. How a picture is cut and blended is the stock
class's: its loop runs twice, once to compute a rank's own tiles and once around the results of all. Does not know what
makes up a tile, which `twin` finds out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from penstock.distributed.group import Group
from penstock.distributed.patch.autoencoder import put_together
from penstock.distributed.twin import TileCall, TilePlan, Twin, gated, split_output
from penstock.errors import ConfigError, GenerationError
from penstock.undo import Undo

_DECODES = ("tiled_decode", "_tiled_decode", "_temporal_tiled_decode", "_decode_clip")
_ENCODES = ("tiled_encode", "_tiled_encode", "_temporal_tiled_encode", "_encode_clip")
_INSTEAD = "Leave vae_patch_parallel_size at 1: the denoiser may be split nevertheless."


def apply_tiles(vae: nn.Module, group: Group, is_switched_on: bool = True) -> Undo:
    """Spread the tiles of a VAE over the ranks of a group, in place.

    Pictures of one tile run as ever, on every rank. All ranks must call the VAE with the same values, and all of them
    get the whole result.

    Args:
        vae: any that `check_tiles` lets pass; its weights may be streamed.
        group: with one rank, nothing is changed.
        is_switched_on: tiling is switched on, with the sizes that the VAE has; else only a VAE that is tiled already,
            or becomes so, is spread.

    Returns:
        What restores the VAE, its tiling included.

    Raises:
        ConfigError: as `check_tiles`.

    Cost: per call, a rank receives the bytes of the tiles that it did not compute, about (n - 1) / n of all. The
    results of all tiles live at once, as they do in the stock loop.
    """
    if group.size == 1:
        return Undo()
    tiles = _Tiles(vae, group, _checked(vae))
    with Undo() as undo:
        if is_switched_on:
            _enable_tiling(vae, undo)
        for name in (*_DECODES, *_ENCODES):
            if hasattr(vae, name):
                undo.wrap(vae, name, partial(tiles.run, name))
    return undo


def check_tiles(vae: nn.Module) -> None:
    """Refuse a VAE whose tiles cannot be spread over ranks with the picture unchanged.

    Args:
        vae: its weights may be on the meta device.

    Raises:
        ConfigError: naming the class, the reason, and what to do instead.

    Cost: as a `Twin`, which is built to see that it can be.
    """
    _checked(vae)


def _checked(vae: nn.Module) -> Twin:
    name = type(vae).__name__
    decoder = getattr(vae, "decoder", None)
    config: Any = getattr(vae, "config", {})
    if not any(hasattr(vae, method) for method in _DECODES) or not hasattr(vae, "enable_tiling"):
        raise ConfigError(f"the VAE is a {name}, which diffusers decodes in one piece: it has no tiles. {_INSTEAD}")
    strange = [method for method in (*_DECODES, *_ENCODES) if not _is_stock(getattr(type(vae), method, None))]
    if strange:
        raise ConfigError(
            f"the VAE is a {name}, whose {strange[0]} is not diffusers' own: which calls make up a tile is unknown. "
            f"{_INSTEAD}"
        )
    if not isinstance(decoder, nn.Module) or hasattr(decoder, "denoise"):
        raise ConfigError(
            f"the VAE is a {name}, whose tiles are denoised from noise of their own inside one decoder call: they "
            f"cannot be told apart from outside. {_INSTEAD}"
        )
    if any(config.get("decoder_inject_noise") or ()):
        raise ConfigError(
            f"the VAE is a {name} with decoder_inject_noise={tuple(config['decoder_inject_noise'])}: each tile draws "
            f"from the random state that the tile before left, and ranks do not compute that tile. {_INSTEAD}"
        )
    return Twin(vae)


def _is_stock(method: Any) -> bool:
    return method is None or method.__module__.startswith("diffusers.")


class _Tiles:
    """A VAE's tiled methods, as a group of ranks runs them."""

    def __init__(self, vae: nn.Module, group: Group, twin: Twin) -> None:
        self._vae = vae
        self._group = group
        self._twin = twin
        self._is_running = False

    def run(self, method: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a tiled method; one that it calls in turn, such as the tiles of some frames, is part of it."""
        if self._is_running or not getattr(self._vae, "use_tiling", True):  # frames in turn are not tiles
            return stock(*args, **kwargs)
        args, kwargs = put_together(args), put_together(kwargs)
        plan = self._twin.plan(method, args, kwargs)
        if len(plan.costs) < 2:
            return stock(*args, **kwargs)
        self._is_running = True
        try:
            device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            run = _Run(self._vae, self._group, plan, device)
            loop = partial(stock, *args, **kwargs)
            _wake(self._vae)
            samples = run.exchange(run.compute(loop))
            return run.replay(loop, samples)
        finally:
            self._is_running = False


def _wake(vae: nn.Module) -> None:
    """Read a little of each weight: those that ranks gather come now, on ranks without tiles of their own as well."""
    for weight in (*vae.parameters(), *vae.buffers()):
        weight[:0] if weight.ndim else weight.item()


class _Run:
    """One tiled encode or decode.

    Args:
        vae: whose halves are called.
        group: the ranks.
        plan: the same on all of them.
        device: where the tiles are.
    """

    def __init__(self, vae: nn.Module, group: Group, plan: TilePlan, device: torch.device) -> None:
        self._vae = vae
        self._group = group
        self._plan = plan
        self._device = device
        self._owners = plan.owners(group.size)

    def compute(self, loop: Callable[[], Any]) -> dict[int, Tensor]:
        """What the calls of this rank's tiles return, by their number. The loop itself gets zeros."""
        own: dict[int, Tensor] = {}
        if self._group.rank not in self._owners:
            return own
        zeros: dict[tuple[Any, ...], Tensor] = {}
        numbers = count()

        def answer(half: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number = next(numbers)
            call, states = self._call(number), ()
            if self._owners[call.tile] == self._group.rank:
                sample, states = split_output(half(*args, **kwargs))
                self._check(number, sample)
                own[number] = sample.contiguous()
            shape = (call.shape, call.dtype)
            if shape not in zeros:
                zeros[shape] = torch.zeros(call.shape, dtype=call.dtype, device=self._device)
            return call.output(zeros[shape], states)

        with gated(self._vae, answer, is_blended=False):
            loop()
        return own

    def exchange(self, own: dict[int, Tensor]) -> deque[Tensor]:
        """What all calls return, in their order, from the ranks that have it."""
        samples: deque[Tensor] = deque()
        for number, call in enumerate(self._plan.calls):
            sample = own.pop(number, None)
            if sample is None:
                sample = torch.empty(call.shape, dtype=call.dtype, device=self._device)
            samples.append(self._group.broadcast(sample, self._owners[call.tile]))
        return samples

    def replay(self, loop: Callable[[], Any], samples: deque[Tensor]) -> Any:
        """The loop's result, where its calls return these; each is let go as soon as the loop has it."""
        numbers = count()

        def answer(half: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._call(next(numbers)).output(samples.popleft())

        with gated(self._vae, answer):
            return loop()

    def _call(self, number: int) -> TileCall:
        if number < len(self._plan.calls):
            return self._plan.calls[number]
        raise self._strayed(f"makes call {number + 1} where {len(self._plan.calls)} were foreseen")

    def _check(self, number: int, sample: Tensor) -> None:
        call, found = self._plan.calls[number], (tuple(sample.shape), sample.dtype)
        if found != (call.shape, call.dtype):
            raise self._strayed(f"returns {found} at call {number + 1} where {(call.shape, call.dtype)} was foreseen")

    def _strayed(self, what: str) -> GenerationError:
        return GenerationError(
            f"the tiled {type(self._vae).__name__} {what}: it does not run as its config describes it, so that ranks "
            f"cannot share its tiles. {_INSTEAD}"
        )


def _enable_tiling(vae: Any, undo: Undo) -> None:
    """Switch tiling on; the undo puts back the switches that this has changed."""
    before, changed = dict(vars(vae)), dict[str, Any]()
    undo.add(lambda: vars(vae).update(changed))
    if vae.use_tiling:
        return
    try:
        vae.enable_tiling()
    finally:
        changed.update((name, value) for name, value in before.items() if vars(vae)[name] is not value)

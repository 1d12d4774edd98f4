"""What a tiled encode or decode is going to call, found out on a copy of the VAE that has shapes and no weights.

Owns the order of the calls of `encoder` and `decoder`, which of them make up one tile, and what each returns. Does not
know ranks, or what the tiles hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from penstock.errors import ConfigError
from penstock.models.quiet import quiet_libraries

Answer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""What a half of the VAE returns: given the half itself, its arguments and keyword arguments."""

_HALVES = ("encoder", "decoder")
_BLENDS = ("blend_v", "blend_h", "blend_t")
_OUTER_STATES = ("clear_cache",)
_INNER_STATES = ("_clear_conv_cache", "_set_first_chunk")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TileCall:
    """One call of an encoder or decoder.

    Attributes:
        tile: number of the tile that it belongs to; the frames of one tile may take several calls.
        shape: of the tensor that it returns.
        dtype: of that tensor.
        num_outputs: length of the tuple that holds it, first; 0 where it comes alone.
    """

    tile: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_outputs: int

    def output(self, sample: Tensor, states: Sequence[Any] = ()) -> Any:
        """What the call returns, around its tensor; without `states`, the rest of the tuple is None."""
        if not self.num_outputs:
            return sample
        return (sample, *(states or (None,) * (self.num_outputs - 1)))


@dataclass(frozen=True)
class TilePlan:
    """The calls of one tiled encode or decode.

    Attributes:
        calls: in their order.
        costs: by tile, how many elements go into it.
    """

    calls: tuple[TileCall, ...]
    costs: tuple[int, ...]

    def owners(self, num_ranks: int) -> tuple[int, ...]:
        """Which rank computes which tile: the largest first, each to the rank that has the least so far."""
        owners, loads = [0] * len(self.costs), [0] * num_ranks
        for tile in sorted(range(len(self.costs)), key=lambda tile: -self.costs[tile]):
            owners[tile] = loads.index(min(loads))
            loads[owners[tile]] += self.costs[tile]
        return tuple(owners)


class Twin:
    """A copy of a VAE on the meta device, made from its config.

    Args:
        vae: the VAE, which the twin follows: its dtypes, tile sizes and switches are read at each plan.

    Raises:
        ConfigError: for a class that cannot be built without weights.

    Cost: some milliseconds, no weights.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae
        self._copy = _copy_of(vae)
        self._plans: dict[str, TilePlan] = {}

    def plan(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TilePlan:
        """The calls that `method` is going to make, given these arguments.

        Cost: a run of each shape of tile without its arithmetic, 0.2 to 1.5 CPU s; 2 ms where it is known already.
        """
        dtypes = [tensor.dtype for tensor in _tensors(self._vae)]
        key = repr((method, tree_map(_describe, (args, kwargs)), _switches(self._vae), dtypes))
        if key not in self._plans:
            _follow(self._copy, self._vae)
            args, kwargs = tree_map(_on_meta, (args, kwargs))
            recording = _Recording(self._copy)
            with torch.no_grad(), gated(self._copy, recording.answer, recording.marks(), is_blended=False):
                getattr(self._copy, method)(*args, **kwargs)
            self._plans[key] = recording.plan()
        return self._plans[key]


class _Recording:
    """The calls of one run of a twin. Tiles of one shape make the same calls: the first of them runs for all."""

    def __init__(self, twin: nn.Module) -> None:
        self._twin = twin
        self._marks = [name for name in (*_OUTER_STATES, *_INNER_STATES) if hasattr(twin, name)]
        self._keeps_state_inside = any(name in _INNER_STATES for name in self._marks)
        self._calls: list[TileCall] = []
        self._costs: list[int] = []
        self._scripts: dict[str, list[Any]] = {}
        self._script: list[Any] = []
        self._is_known = False
        self._is_marked = True
        self._step = 0
        self._last = ""

    def plan(self) -> TilePlan:
        """What was recorded."""
        return TilePlan(tuple(self._calls), tuple(self._costs))

    def marks(self) -> dict[str, Any]:
        """The methods by which a VAE forgets its last tile, made to begin another."""

        def marking(name: str) -> Callable[..., Any]:
            method = getattr(self._twin, name)

            def mark(*args: Any, **kwargs: Any) -> Any:
                if name != "_set_first_chunk" or True in (*args, *kwargs.values()):
                    self._is_marked = True
                return method(*args, **kwargs)

            return mark

        return {name: marking(name) for name in self._marks}

    def answer(self, half: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note a call, and return what the half would."""
        key = repr((type(half), tree_map(_describe, (args, kwargs))))
        if self._is_marked if self._marks else kwargs.get("conv_cache") is None:
            self._is_marked = False
            self._is_known = key in self._scripts
            self._script = self._scripts.setdefault(key, [])
            self._step, self._last = 0, ""
            self._costs.append(0)
        if not self._is_known:
            # arguments like those of the call before, its state among them: that call has left all as it found it
            is_settled = key == self._last and not self._keeps_state_inside
            self._script.append(self._script[-1] if is_settled else half(*args, **kwargs))
            self._last = key
        output = self._script[self._step]
        self._step += 1
        sample, states = split_output(output)
        num_outputs = 1 + len(states) if isinstance(output, tuple) else 0
        self._calls.append(TileCall(len(self._costs) - 1, tuple(sample.shape), sample.dtype, num_outputs))
        self._costs[-1] += next(leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return output


class _Gate:
    """Stands before an encoder or decoder: others answer its calls, all else is the module's own."""

    def __init__(self, half: nn.Module, answer: Answer) -> None:
        self._half = half
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self._half, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._half, name)


@contextmanager
def gated(
    vae: nn.Module, answer: Answer, others: Mapping[str, Any] = MappingProxyType({}), is_blended: bool = True
) -> Iterator[None]:
    """Inside, `answer` is asked in place of the VAE's halves.

    Hooks of a half do not run unless `answer` calls it.

    Args:
        vae: whose instance is changed, and comes back as it was.
        answer: takes the calls.
        others: further attributes that stand before the VAE's own.
        is_blended: tiles are blended as ever; without, they keep their values.
    """
    attributes = dict(others)
    for name in _HALVES:
        half = getattr(vae, name, None)
        if isinstance(half, nn.Module):
            attributes[name] = _Gate(half, answer)
    if not is_blended:
        attributes |= {name: _unblended for name in _BLENDS if hasattr(vae, name)}
    own = vars(vae)
    hidden = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(hidden)


def split_output(output: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """A half's tensor, and the states that came with it."""
    return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())


def _unblended(before: Tensor, tile: Tensor, *_: Any) -> Tensor:
    return tile


def _copy_of(vae: nn.Module) -> nn.Module:
    build: Any = getattr(vae, "from_config", None)
    try:
        if build is None:
            raise TypeError("it has no from_config")
        with torch.device("meta"), quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin: nn.Module = build(vae.config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the tiles of a {type(vae).__name__} cannot be foreseen: building it without weights from its config "
            f"raised {type(error).__name__}: {error}. Leave vae_patch_parallel_size at 1."
        ) from error
    return twin.to("meta").requires_grad_(False)  # a constructor may name a device, or be of a legacy kind


def _follow(twin: nn.Module, vae: nn.Module) -> None:
    """Give a twin the switches and dtypes of its VAE; what the VAE has beside, such as adapters, does not matter."""
    modules = dict(twin.named_modules())
    for name, module in vae.named_modules():
        if name not in modules:
            continue
        modules[name].__dict__.update(_switches(module))
        for own, others in ((modules[name]._parameters, module._parameters), (modules[name]._buffers, module._buffers)):
            for key, tensor in own.items():
                other = others.get(key)
                if tensor is not None and other is not None and tensor.dtype != other.dtype:
                    tensor.data = torch.empty_like(tensor, dtype=other.dtype)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _switches(module: nn.Module) -> dict[str, Any]:
    """Attributes that are plain values: sizes of tiles, strides, whether to tile at all."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))

    return {name: value for name, value in vars(module).items() if not name.startswith("_") and is_plain(value)}


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype)
    return leaf if isinstance(leaf, _PLAIN) else type(leaf)


def _on_meta(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf

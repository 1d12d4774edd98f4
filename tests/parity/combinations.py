"""Every way to split a denoiser over so many ranks, with weights resident or streamed: what works, what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import penstock
from penstock.config import ParallelConfig
from penstock.errors import ConfigError
from tests.distributed.sequences import tensors_of
from tests.tolerance import difference, tolerance_of
from tests.turns import IS_THOROUGH, by_turns
from tests.zoo.denoisers import CASES

AXES = ("cfg_parallel_size", "pipeline_parallel_size", "ring_degree", "ulysses_degree", "tensor_parallel_size")
STREAMED = {"offload": "layerwise", "max_weight_memory": "least"}
SHARDED = {"use_hsdp": True}
HEADS = 8


@dataclass(frozen=True)
class Outcome:
    """What became of one combination.

    Attributes:
        degrees: those that are on.
        is_streamed: whether weights were streamed.
        is_sharded: whether ranks with the same weights held them together.
        share: difference to the plain run as a share of what is allowed; None where it was refused.
        refusal: why it was.
    """

    degrees: tuple[tuple[str, int], ...]
    is_streamed: bool
    is_sharded: bool
    share: float | None
    refusal: str = ""


def products(world_size: int) -> Iterator[dict[str, int]]:
    """Every way to write a number of ranks as a product of degrees."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(sizes) == world_size:
            yield dict(zip(AXES, sizes, strict=True))


def ways(world_size: int) -> Iterator[tuple[dict[str, int], dict[str, str], dict[str, bool]]]:
    """Degrees, options and shards: each product resident, streamed, and sharded in one of two ways by turns.

    On more than two ranks each product is tried in one of these ways; and, but for thorough runs, only some products.
    """
    for turn, degrees in enumerate(by_turns(products(world_size), 6 if world_size > 4 else world_size // 2), 1):
        choices: list[tuple[dict[str, str], dict[str, bool]]] = [({"offload": "none"}, {}), (STREAMED, {})]
        if ParallelConfig(**degrees).num_holders > 1:
            choices.append((({"offload": "sharded"} if turn % 2 else STREAMED), SHARDED))
        for options, shards in choices if world_size <= 2 or IS_THOROUGH else [choices[turn % len(choices)]]:
            yield degrees, options, shards


class Guided:
    """A pipeline around one denoiser: two steps, each with two calls for guidance."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def __call__(self, inputs: dict[str, Any], streams: tuple[str, ...]) -> list[Tensor]:
        """Denoise the arguments named `streams` for two steps; returns the last predictions and the samples."""
        texts = {name: value for name, value in inputs.items() if name.startswith("encoder_hidden_states")}
        blank = {name: value * 0.5 for name, value in texts.items() if _is_float(value)}
        samples = {name: inputs[name] for name in streams}
        noises: list[Tensor] = []
        with torch.inference_mode():
            for _ in range(2):
                given = tensors_of(self.transformer(**_copied({**inputs, **samples})))
                free = tensors_of(self.transformer(**_copied({**inputs, **blank, **samples})))
                noises = [one + 3.0 * (other - one) for one, other in zip(free, given, strict=True)]
                noise = iter(noises)
                samples = tree_map(lambda sample, noise=noise: _step(sample, next(noise)), samples)
        return [*noises, *tree_leaves(samples)]


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """With lists of their own: some denoisers empty those that they are given."""
    return tree_map(lambda leaf: leaf, arguments)


def _step(sample: Tensor, noise: Tensor) -> Tensor:
    """A step against the noise; where that has other channels, against its mean."""
    fits = noise.numel() == sample.numel()
    return sample - 0.1 * (noise.reshape(sample.shape) if fits else noise.mean()) / noise.std()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def try_all(name: str, world_size: int) -> list[Outcome]:
    """On every rank: the outcome of every combination for one denoiser."""
    case = CASES[name]
    inputs = case.inputs("odd")
    stock = Guided(case.build(heads=HEADS))
    plain = stock(inputs, case.streams)
    allowed = tolerance_of(stock.transformer, lambda: stock(inputs, case.streams), plain)
    outcomes = []
    for degrees, options, shards in ways(world_size):
        on = tuple((axis, size) for axis, size in degrees.items() if size > 1)
        pipeline = Guided(case.build(heads=HEADS))
        try:
            parallel = ParallelConfig(**degrees, **shards)
            placed = penstock.apply(pipeline, parallel=parallel, device="cpu", **options)
        except ConfigError as error:
            outcomes.append(Outcome(on, options is STREAMED, bool(shards), None, str(error)))
            continue
        found = pipeline(inputs, case.streams)
        placed.remove()
        outcomes.append(Outcome(on, options is STREAMED, bool(shards), difference(found, plain) / allowed))
    return outcomes

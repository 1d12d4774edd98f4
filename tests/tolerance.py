"""How far a right result may be from the plain one: measured on the plain one, in the same test, on this processor.

Kernels round by instruction set and by where weights lie in memory, and a split sums in another order. Each sum in
another order is the exact result of operands that are a few units in the last place away (backward error), so a run
whose weights are moved by one such unit, and copied to memory of another alignment, shows how much of that a model
lets through: 1e-6 of the range for some pipelines, 2e-4 for others. Bit equality is for runs whose weights lie alike.

    assert difference(split, plain) < tolerance_of(model, lambda: run(model, inputs))
    assert difference(split, plain) < tolerance_of_pipeline("wan21")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo

FACTOR = 10.0
"""How many times as far as the plain run is from itself: the moved weights are one draw of many."""
SHORT_FACTOR = 3.0
"""The same in dtypes of 16 bits, whose kernels sum in float32: another order moves a result by less than a unit."""
FLOOR_ULPS = 4.0
"""What is always allowed, in units in the last place of 1: parts that are merged are rounded also where no weight is,
and a control of exactly 0 (a model whose weights change nothing, or whose result is rounded) would allow nothing."""

_MEASURED: dict[tuple[str, str], float] = {}


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value; infinite for another shape or what is not finite."""
    if not one or [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return math.inf
    return max(_difference(a, b) for a, b in zip(one, other, strict=True))


def _difference(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    largest, scale = float((one.double() - other.double()).abs().max()), float(other.double().abs().max())
    if not math.isfinite(largest) or not math.isfinite(scale):
        return math.inf
    return largest / scale if scale else largest


def elsewhere(tensor: Tensor, num_ulps: int = 1, seed: int = 0) -> Tensor:
    """A copy at another alignment, each value moved up or down so many units in the last place."""
    generator = torch.Generator().manual_seed(seed)
    copy = tensor.detach().clone()
    ends = torch.where(torch.rand(copy.shape, generator=generator) < 0.5, -math.inf, math.inf).to(copy.dtype)
    for _ in range(num_ulps):
        copy = torch.nextafter(copy, ends)
    skew = 1 if tensor.data_ptr() % 64 == 0 else 0  # elements behind the begin of a cache line
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    moved = torch.empty(extent + skew, dtype=copy.dtype).as_strided(tensor.shape, tensor.stride(), skew)
    moved.copy_(copy)
    return moved


@contextmanager
def moved(subject: Any, num_ulps: int = 1) -> Iterator[None]:
    """Moves the weights of a pipeline, a module or a list of tensors inside; then puts them back as they lay."""
    kept = [(tensor, tensor.data) for tensor in _tensors(subject) if tensor.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = elsewhere(data, num_ulps)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _tensors(subject: Any) -> Iterable[Tensor]:
    if isinstance(subject, nn.Module):
        return list(subject.parameters())
    if isinstance(subject, (list, tuple)):
        return [tensor for part in subject for tensor in ([part] if isinstance(part, Tensor) else _tensors(part))]
    parts = getattr(subject, "components", None) or vars(subject)
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]
    return list({id(tensor): tensor for module in modules for tensor in module.parameters()}.values())


def tolerance_of(subject: Any, run: Callable[[], Sequence[Tensor]], plain: Sequence[Tensor] | None = None) -> float:
    """The largest difference of a right result, relative to the largest value.

    Args:
        subject: Whose weights are moved: a pipeline, a module, or tensors.
        run: Runs it plain; the same result each time.
        plain: What it makes; left out, it runs once more.
    """
    plain = [tensor.clone() for tensor in run()] if plain is None else plain
    with moved(subject):
        far = difference(run(), plain)
    assert math.isfinite(far), "the plain result is not finite"
    eps = max(torch.finfo(tensor.dtype).eps for tensor in plain if tensor.is_floating_point())
    return max((FACTOR if eps < 1e-4 else SHORT_FACTOR) * far, FLOOR_ULPS * eps)


def tolerance_of_pipeline(name: str, **overrides: Any) -> float:
    """The same of a pipeline of the zoo, measured once per process for each set of arguments."""
    key = (name, repr(sorted(overrides.items())))
    if key not in _MEASURED:
        pipeline = zoo.build(name)

        def run() -> Sequence[Tensor]:
            with torch.inference_mode():
                return zoo.tensors(zoo.run(pipeline, name, **overrides))

        _MEASURED[key] = tolerance_of(pipeline, run)
    return _MEASURED[key]

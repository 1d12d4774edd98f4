"""What torch can see of a weight is the plain one's: recorded for each operation of a run, and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import penstock
from penstock.offload import tenants
from penstock.offload.likeness import hand_over, made_like
from tests import zoo
from tests.parity.test_offload import budget, is_equal, stock


class Seen(TorchFunctionMode):
    """What each operation can see of the weights that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("linear", "conv2d", "conv3d", "layer_norm", "group_norm", "embedding"):
            weights = [weight for weight in args if isinstance(weight, nn.Parameter)]
            self.facts += [(func.__name__, number, *facts(weight)) for number, weight in enumerate(weights)]
        return func(*args, **(kwargs or {}))


def facts(weight: Any) -> tuple[Any, ...]:
    return (
        tuple(weight.shape),
        weight.stride(),
        weight.dtype,
        weight.requires_grad,
        weight.is_leaf,
        weight.grad_fn,
        weight.is_contiguous(),
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last),
        weight._backward_hooks is None,
        getattr(weight, "mark", None),
    )


def seen(pipeline: Any, name: str) -> tuple[list[tuple[Any, ...]], tuple[torch.Tensor, ...]]:
    with Seen() as record:
        made = zoo.tensors(zoo.run(pipeline, name))
    return record.facts, made


def marked(name: str, folder: Path) -> Any:
    """A pipeline as stock loads it; half of the weights are frozen, some have attributes and hooks."""
    pipeline = stock(name, folder)
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number % 3 > 0)
        if number % 4 == 0:
            parameter.mark = number  # type: ignore[attr-defined]
        if number % 3 == 1:
            parameter.register_hook(print)
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, nn.Conv2d):
                inner.to(memory_format=torch.channels_last)
    return pipeline


@pytest.mark.parametrize("name", ["stranger", "sd15"])
def test_operations_see_the_plain_weights(
    name: str, zoo_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = seen(marked(name, zoo_folder(name)), name)
    for mode, share in (("layerwise", "least"), ("layerwise", "half"), ("sequential", "least"), ("none", "all")):
        pipeline = marked(name, zoo_folder(name))
        size = budget(share, pipeline, mode) if mode != "none" else None
        with penstock.apply(pipeline, offload=mode, max_weight_memory=size):
            for _ in range(2):  # what is cold at first, and what is there
                found = seen(pipeline, name)
                assert found[0] == plain[0] and is_equal(plain[1], found[1])
        assert seen(pipeline, name)[0] == plain[0]
    assert {fact[5] for fact in plain[0]} == {True, False} and any(fact[-1] for fact in plain[0])

    def frozen(original: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return nn.Parameter(memory, requires_grad=False) if isinstance(original, nn.Parameter) else memory

    monkeypatch.setattr(tenants, "made_like", frozen)  # the record can tell
    with penstock.apply(marked(name, zoo_folder(name)), offload="layerwise") as placed:
        assert seen(placed.pipeline, name)[0] != plain[0]


def test_channels_last_is_kept_bit_for_bit(zoo_folder: Callable[[str], Path]) -> None:
    pipeline = stock("sd15", zoo_folder("sd15"))
    before = seen(pipeline, "sd15")
    for module in (pipeline.vae, pipeline.unet):
        module.to(memory_format=torch.channels_last)
    plain = seen(pipeline, "sd15")
    assert plain[0] != before[0]
    for mode, share in (("layerwise", "least"), ("layerwise", "half"), ("sequential", "least")):
        with penstock.apply(pipeline, offload=mode, max_weight_memory=budget(share, pipeline, mode), check=True):
            found = seen(pipeline, "sd15")
            assert found[0] == plain[0] and is_equal(plain[1], found[1])
    found = seen(pipeline, "sd15")
    assert found[0] == plain[0] and is_equal(plain[1], found[1])


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_a_likeness_shares_attributes_hooks_and_gradient(kind: Any, flag: bool) -> None:
    original = kind(torch.arange(4.0)).requires_grad_(flag)
    original.mark = 1
    if flag:
        original.register_hook(lambda gradient: gradient * 3)
        original.grad = torch.ones(4)
    made = made_like(original, torch.arange(4.0))
    assert type(made) is type(original) and isinstance(made, kind)
    assert facts(made) == facts(original) and not made._is_view() and made.grad is original.grad
    made.other = 2  # type: ignore[attr-defined]
    assert original.other == 2
    if flag:
        (made * torch.ones(4)).sum().backward()  # type: ignore[no-untyped-call]
        assert made.grad is not None and made.grad.tolist() == [4.0] * 4


def test_what_happened_to_a_likeness_is_handed_back() -> None:
    original = nn.Parameter(torch.ones(2))
    made = made_like(original, torch.ones(2))
    made.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
    made.sum().backward()  # type: ignore[no-untyped-call]
    made.requires_grad_(False)
    hand_over(made, original)
    assert original.grad is not None and original.grad.tolist() == [2.0, 2.0]
    assert not original.requires_grad and original._backward_hooks is made._backward_hooks

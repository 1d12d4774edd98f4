"""Gradients of a placed pipeline are the plain ones, or refused: however activations and weights are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

from penstock.errors import UsageError
from penstock.offload import residency, stage
from penstock.offload.gradients import is_in_backward
from tests.offload.toys import WIDTH, Pipeline, streamed

Way = Callable[[Pipeline], Any]


@contextmanager
def checkpointed(pipeline: Pipeline, **options: Any) -> Iterator[None]:
    """Each block computes its forward again in the backward."""
    for block in pipeline.transformer.blocks:
        block.forward = partial(checkpoint, type(block).forward, block, **options)
    try:
        yield
    finally:
        for block in pipeline.transformer.blocks:
            del block.forward


@contextmanager
def called_through(pipeline: Pipeline, **options: Any) -> Iterator[None]:
    """As diffusers does it: what is computed again is the call of a block, hooks included."""
    blocks = list(pipeline.transformer.blocks)

    def run(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = pipeline.transformer.entry(x) + timestep / 1000
        for block in blocks:
            x = checkpoint(block, x, **options)
        return pipeline.transformer.head(x)

    pipeline.transformer.forward = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.transformer.forward


WAYS: dict[str, Way] = {
    "plain": lambda pipeline: nullcontext(),
    "checkpoint": lambda pipeline: called_through(pipeline, use_reentrant=False),
    "reentrant checkpoint": lambda pipeline: called_through(pipeline, use_reentrant=True),
    "checkpoint inside": lambda pipeline: checkpointed(pipeline, use_reentrant=False),
    "identity": lambda pipeline: graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    "cpu": lambda pipeline: graph.save_on_cpu(),
    "mutation": lambda pipeline: graph.allow_mutation_on_saved_tensors(),
}


def gradients(pipeline: Pipeline, way: str, has_input: bool) -> list[torch.Tensor | None]:
    """Of the input and all weights."""
    x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH).requires_grad_(has_input)
    try:
        with WAYS[way](pipeline):
            pipeline.transformer(x, torch.tensor(500.0)).pow(2).sum().backward()
        return [x.grad, *(weight.grad for weight in pipeline.transformer.parameters())]
    finally:
        pipeline.transformer.zero_grad()


def is_same(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("has_input", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_plain_ones_where_all_stays_and_refused_where_not(way: str, has_input: bool) -> None:
    plain = gradients(Pipeline(), way, has_input)
    assert sum(gradient is not None for gradient in plain) >= len(plain) - 1
    pipeline = Pipeline()
    with streamed(pipeline, budget="1MiB"):
        for _ in range(2):
            assert is_same(plain, gradients(pipeline, way, has_input))
    for budget, prefetch in (("least", 0), ("least", 1), ("24KiB", 1)):
        pipeline = Pipeline()
        with streamed(pipeline, prefetch=prefetch, budget=budget):
            for _ in range(2):
                with pytest.raises(UsageError, match="backward needs the weights of transformer.blocks"):
                    gradients(pipeline, way, has_input)
            with torch.no_grad():
                pipeline()
        assert is_same(plain, gradients(pipeline, way, has_input))


@pytest.mark.parametrize("way", ["identity", "cpu"])
def test_without_the_check_gradients_would_be_wrong(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(Pipeline(), way, True)
    monkeypatch.setattr(stage, "watch_backward", lambda *_: None)
    monkeypatch.setattr(residency, "is_in_backward", lambda: False)
    pipeline = Pipeline()
    with streamed(pipeline):
        assert not is_same(plain, gradients(pipeline, way, True))


def test_components_that_take_turns_keep_gradients_apart() -> None:
    """A component whose place another one has taken since."""
    pipeline = Pipeline()
    x = torch.ones(2, WIDTH, requires_grad=True)
    with streamed(pipeline, None, offload="sequential"), WAYS["identity"](pipeline):
        loss = pipeline.vae.decode(pipeline.transformer(x, torch.tensor(1.0))).sum()
        with pytest.raises(UsageError, match="backward needs the weights of transformer"):
            loss.backward()
        pipeline.transformer(x, torch.tensor(1.0)).sum().backward()
        assert x.grad is not None


def test_gradients_of_weights_stay_when_removed() -> None:
    plain = Pipeline()
    pipeline = Pipeline()
    with streamed(pipeline, budget="1MiB"):
        for one in (plain, pipeline):
            one.transformer(torch.ones(2, WIDTH), torch.tensor(1.0)).sum().backward()
    assert is_same(*([weight.grad for weight in one.transformer.parameters()] for one in (plain, pipeline)))


def test_tensors_that_pass_through_a_block_are_not_hooked() -> None:
    pipeline = Pipeline()
    leaf = torch.ones(2, WIDTH, requires_grad=True)
    for block in pipeline.transformer.blocks:
        block.forward = lambda x: x
    with streamed(pipeline):
        for block in pipeline.transformer.blocks:
            assert block(leaf) is leaf
        pipeline()
        (leaf * 2).sum().backward()
    assert leaf.grad is not None


def test_a_backward_is_told_from_a_forward() -> None:
    seen = [is_in_backward()]
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(is_in_backward()))  # type: ignore[no-untyped-call]
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert [*seen, is_in_backward()] == [False, True, False]

"""Compiled blocks stream: one graph each, no break at a hook, nothing compiled again over steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from penstock.errors import ConfigError
from penstock.offload.compiled import compile_inside
from tests import zoo
from tests.offload.toys import WIDTH, Block, Pipeline, streamed

X = torch.linspace(-1, 1, WIDTH)[None]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Backend:
    """Counts the graphs that it is given and the runs of each."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.num_graphs += 1

        def run(*args: Any) -> Any:
            self.num_runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_of_a_streamed_component_compile_without_a_break(backend: str) -> None:
    expected = Pipeline()()
    pipeline = Pipeline()
    with streamed(pipeline, 1, is_checked=True):
        for block in pipeline.transformer.blocks:
            block.compile(backend=backend, fullgraph=True)
        assert torch.equal(pipeline(num_steps=3), expected)
        first = compiled_graphs()
        assert 1 <= first <= 6 and not counters["graph_break"]
        assert torch.equal(pipeline(num_steps=3), expected)
        assert compiled_graphs() == first


def test_every_forward_of_a_block_runs_its_graph() -> None:
    backend = Backend()
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        for block in pipeline.transformer.blocks:
            block.compile(backend=backend)
        pipeline(num_steps=3)
        assert 1 <= backend.num_graphs <= 6 and backend.num_runs == 18
        assert streamer.residency.num_demanded == 1  # the decoder's: prefetch sees compiled blocks
        pipeline(num_steps=3)
        assert 1 <= backend.num_graphs <= 6 and backend.num_runs == 36


def test_resident_blocks_compile_as_well() -> None:
    expected, pipeline, backend = Pipeline()(), Pipeline(), Backend()
    with streamed(pipeline, 1, "1MiB") as streamer:
        assert all(tenant.plan.slot is None for tenant in streamer.tenants)
        for block in pipeline.transformer.blocks:
            block.compile(backend=backend, fullgraph=True)
        assert torch.equal(pipeline(), expected) and backend.num_runs == 18


def test_compile_repeated_blocks_of_diffusers() -> None:
    expected = zoo.tensors(zoo.run(zoo.build("flux"), "flux"))
    pipeline = zoo.build("flux")
    with streamed(pipeline, 1) as streamer:
        pipeline.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        for found in (zoo.tensors(zoo.run(pipeline, "flux")) for _ in range(2)):
            assert all(map(torch.equal, found, expected))
        first = compiled_graphs()
        assert first >= 2 and not counters["graph_break"]
        zoo.run(pipeline, "flux", num_inference_steps=4)
        assert compiled_graphs() == first
        assert streamer.residency.num_fills > 8


def test_undoing_puts_compile_and_forward_back() -> None:
    block = Block()
    before = dict(vars(block))
    undo = compile_inside(block)
    block.compile(backend="eager")
    assert torch.equal(block(X), type(block).forward(block, X)) and "forward" in vars(block)
    undo()
    undo()
    assert dict(vars(block)) == before


def test_a_forward_of_its_own_is_put_back() -> None:
    block = Block()
    vars(block)["forward"] = own = lambda x: x + 1
    undo = compile_inside(block)
    block.compile(backend="eager")
    assert torch.equal(block(X), X + 1) and vars(block)["forward"] is not own
    undo()
    assert vars(block)["forward"] is own


def test_after_removal_the_pipeline_is_plain_and_compiles_as_ever() -> None:
    expected, pipeline = Pipeline()(), Pipeline()
    with streamed(pipeline, 1):
        pipeline.transformer.blocks[0].compile(backend="eager")
        pipeline()
    assert torch.equal(pipeline(), expected)
    pipeline.transformer.blocks[0].compile(backend="eager")
    assert pipeline.transformer.blocks[0]._compiled_call_impl is not None
    assert torch.equal(pipeline(), expected)


def test_a_block_that_is_compiled_before_is_refused_and_nothing_stays_behind() -> None:
    expected, pipeline = Pipeline()(), Pipeline()
    weights = {name: id(weight) for name, weight in pipeline.transformer.named_parameters()}
    pipeline.transformer.blocks[3].compile(backend="eager")
    with pytest.raises(ConfigError, match="a Block is compiled already"), streamed(pipeline, 1):
        raise AssertionError("installed")
    assert {name: id(weight) for name, weight in pipeline.transformer.named_parameters()} == weights
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())
    assert torch.equal(pipeline(), expected)

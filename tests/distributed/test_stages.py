"""A denoiser in stages gives the bits of the whole one, and each rank has its own blocks' weights and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import penstock
from penstock.config import ParallelConfig
from penstock.distributed import relay
from penstock.distributed.mesh import build_mesh
from penstock.distributed.relay import HEAD_BYTES
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.distributed.stages import apply_stages, check_stages, deal
from penstock.distributed.tensor import apply_tensor
from penstock.errors import ConfigError, GenerationError
from penstock.models.rows.table import row_of
from tests import zoo
from tests.distributed.stages import (
    ROW,
    Denoiser,
    are_equal,
    forward,
    hold,
    row_for,
    stages,
)
from tests.ranks import run_ranks
from tests.zoo.denoisers import CASES

ENTANGLED = {"HunyuanDiT2DModel", "DiTTransformer2DModel", "CosmosTransformer3DModel"}
OWNERS = {name: type(denoiser).__name__ for name, case in CASES.items() if row_of(denoiser := case.build()) is not None}
NAMES = [name for name, owner in OWNERS.items() if owner not in ENTANGLED]
REFUSED = [name for name, owner in OWNERS.items() if owner in ENTANGLED]
MAIN = ("flux", "qwen_image", "sd3", "wan", "hunyuan_video", "ltx2", "z_image", "cogvideox")
"""Families that three stages are tried with."""


# ---- the same bits ----


def run_case(name: str, size: int) -> None:
    case = CASES[name]
    denoiser = case.build()
    variants = tuple(dict.fromkeys((case.variants[0], case.variants[-1])))
    plain = {variant: forward(denoiser, case.inputs(variant)) for variant in variants}
    before = dict(denoiser.named_modules())
    undo = apply_stages(denoiser, row_for(denoiser), stages(size), hold)
    for variant in (*variants, *variants):
        assert are_equal(forward(denoiser, case.inputs(variant)), plain[variant]), variant
    undo.run()
    assert dict(denoiser.named_modules()) == before
    assert all("forward" not in vars(module) for module in denoiser.modules())
    assert not denoiser._forward_hooks and not denoiser._forward_pre_hooks
    assert "add_adapter" not in vars(denoiser)
    assert are_equal(forward(denoiser, case.inputs(variants[0])), plain[variants[0]])


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in NAMES), *((name, 3) for name in MAIN)])
def test_every_class_with_a_row_in_stages(name: str, size: int) -> None:
    run_ranks(size, run_case, name, size)


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_reach_past_their_blocks_are_refused(name: str) -> None:
    denoiser = CASES[name].build()
    with pytest.raises(ConfigError, match=f"{OWNERS[name]} cannot run in 2 stages: its (later|forward|blocks)"):
        check_stages(denoiser, row_of(denoiser), 2)


def test_four_stages() -> None:
    run_ranks(4, run_case, "flux", 4)


def run_bfloat16() -> None:
    case = CASES["flux"]
    denoiser = case.build().to(torch.bfloat16)
    inputs = {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs("odd").items()
    }
    single = {name: value[:1] if len(value) == 2 else value for name, value in inputs.items() if name != "return_dict"}
    plain = forward(denoiser, inputs), forward(denoiser, {**single, "return_dict": False})
    apply_stages(denoiser, row_for(denoiser), stages(3))
    assert are_equal(forward(denoiser, inputs), plain[0])
    assert are_equal(forward(denoiser, {**single, "return_dict": False}), plain[1])


def test_half_precision_and_a_batch_of_another_size() -> None:
    run_ranks(3, run_bfloat16)


def run_skipping() -> None:
    case = CASES["sd3"]
    denoiser = case.build()
    inputs = case.inputs("odd")
    plain = [forward(denoiser, inputs, skip_layers=[index]) for index in (0, 1)]
    apply_stages(denoiser, row_for(denoiser), stages(3))
    assert are_equal(forward(denoiser, inputs, skip_layers=[0]), plain[0])
    assert are_equal(forward(denoiser, inputs, skip_layers=[1]), plain[1])
    with pytest.raises(GenerationError, match="last block did not run"):
        forward(denoiser, inputs, skip_layers=[2])


def test_blocks_that_a_call_leaves_out() -> None:
    run_ranks(3, run_skipping)


def run_compiled() -> None:
    denoiser = CASES["flux"].build()
    inputs = CASES["flux"].inputs("odd")
    plain = forward(denoiser, inputs)
    apply_stages(denoiser, row_for(denoiser), stages(2))
    for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
        block.compile(backend="eager")
    assert are_equal(forward(denoiser, inputs), plain)


def test_compiled_blocks() -> None:
    run_ranks(2, run_compiled)


def run_with_sequence(name: str) -> None:
    case = CASES[name]
    denoiser = case.build()
    mesh = build_mesh(ParallelConfig(pipeline_parallel_size=2, ulysses_degree=2), "cpu")
    variant = case.variants[-1]
    found = check_sequence(denoiser, mesh.config)
    whole = forward(denoiser, case.inputs(variant))
    undo = apply_sequence(denoiser, found, mesh)
    plain = forward(denoiser, case.inputs(variant))
    undo.run()
    undo = apply_stages(denoiser, found, mesh["pipeline"], hold)
    undone = apply_sequence(denoiser, found, mesh)
    assert are_equal(forward(denoiser, case.inputs(variant)), plain)
    undone.run()
    undo.run()
    assert are_equal(forward(denoiser, case.inputs(variant)), whole)


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2"])
def test_stages_whose_streams_are_cut(name: str) -> None:
    run_ranks(4, run_with_sequence, name)


def run_with_slices(name: str) -> None:
    case = CASES[name]
    denoiser = case.build()
    mesh = build_mesh(ParallelConfig(pipeline_parallel_size=2, tensor_parallel_size=2), "cpu")
    undo = apply_tensor(denoiser, mesh["tensor"])
    plain = forward(denoiser, case.inputs("odd"))
    undo.run()
    undo = apply_stages(denoiser, row_for(denoiser), mesh["pipeline"], hold)
    undone = apply_tensor(denoiser, mesh["tensor"])
    assert are_equal(forward(denoiser, case.inputs("odd")), plain)
    undone.run()
    undo.run()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_stages_whose_layers_are_sliced(name: str) -> None:
    run_ranks(4, run_with_slices, name)


# ---- the comparison can fail ----


def run_unconnected() -> None:
    """Streams that stay where they are."""
    inputs = CASES["flux"].inputs("odd")
    patch = pytest.MonkeyPatch()
    denoiser = CASES["flux"].build()
    plain = forward(denoiser, inputs)
    try:
        patch.setattr(relay.Relay, "cross", lambda self, streams, stage: setattr(self, "holder", stage) or streams)
        undo = apply_stages(denoiser, row_for(denoiser), stages(2), hold)
        with pytest.raises(GenerationError, match="NaN in 2 stages"):
            forward(denoiser, inputs)
        patch.setattr(relay, "_unknown", lambda stream: stream)
        assert not are_equal(forward(denoiser, inputs), plain)
        undo.run()
    finally:
        patch.undo()
    assert are_equal(forward(denoiser, inputs), plain)


def test_without_the_exchange_the_result_is_another() -> None:
    run_ranks(2, run_unconnected)


def run_keeping() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(4, 4, is_keeping=True)
    group = stages(2)
    apply_stages(denoiser, ROW, group)
    if group.rank == 0:
        assert forward(denoiser, {"hidden_states": torch.ones(1, 2, 4)})  # it has the first block
    else:
        with pytest.raises(GenerationError, match="keeps for later what a block returns"):
            forward(denoiser, {"hidden_states": torch.ones(1, 2, 4)})


def test_a_class_that_keeps_what_blocks_return_is_told() -> None:
    run_ranks(2, run_keeping)


# ---- whole pipelines ----


def run_pipeline(name: str, size: int) -> None:
    pipe = zoo.build(name)
    plain, other = (list(zoo.tensors(zoo.run(pipe, name, seed=seed))) for seed in (0, 1))
    assert not are_equal(plain, other)
    group = stages(size)
    denoisers = [module for key, module in pipe.components.items() if key.startswith("transformer")]
    undos = [apply_stages(denoiser, row_for(denoiser), group, hold) for denoiser in denoisers]
    assert are_equal(list(zoo.tensors(zoo.run(pipe, name, seed=0))), plain)
    assert are_equal(list(zoo.tensors(zoo.run(pipe, name, seed=1))), other)
    for undo in undos:
        undo.run()
    assert are_equal(list(zoo.tensors(zoo.run(pipe, name))), plain)


@pytest.mark.parametrize(("name", "size"), [("flux", 3), ("wan22", 2)])
def test_whole_pipelines(name: str, size: int) -> None:
    run_ranks(size, run_pipeline, name, size)


def run_streamed(name: str) -> None:
    pipe = zoo.build(name)
    plain = list(zoo.tensors(zoo.run(pipe, name)))
    parallel = ParallelConfig(pipeline_parallel_size=2)
    rank = stages(2).rank
    own = set(deal(pipe.transformer, row_for(pipe.transformer), 2)[rank])
    with penstock.apply(pipe, parallel=parallel, offload="layerwise", max_weight_memory="least") as placed:
        assert are_equal(list(zoo.tensors(zoo.run(pipe, name))), plain)
        assert are_equal(list(zoo.tensors(zoo.run(pipe, name))), plain)
        report = placed.report()
    units = {unit.name for unit in report.units if unit.name.startswith("transformer.")}
    assert units == {f"transformer.{path}" for path in own}
    assert report.num_fills > len(report.units)  # some came more than once


@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_stages_whose_weights_stream(name: str) -> None:
    run_ranks(2, run_streamed, name)


# ---- traffic ----


def run_traffic(name: str, size: int, streams: dict[str, int]) -> None:
    denoiser = CASES[name].build()
    inputs = CASES[name].inputs("odd")
    group = stages(size)
    apply_stages(denoiser, row_for(denoiser), group)
    for _ in range(2):
        group.traffic.clear()
        forward(denoiser, inputs)
        received = group.traffic.received_bytes
        heads = len(streams) * HEAD_BYTES
        assert received["receive"] == (sum(streams.values()) + heads if group.rank > 0 else 0)
        assert received["broadcast"] == (sum(streams.values()) + heads if group.rank < size - 1 else 0)
        assert group.traffic.num_calls["send"] == (1 + len(streams) if group.rank < size - 1 else 0)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_between_stages(size: int) -> None:
    width = 4 * 16
    run_ranks(size, run_traffic, "flux", size, {"img": 2 * 45 * width * 4, "txt": 2 * 7 * width * 4})
    run_ranks(size, run_traffic, "wan", size, {"img": 2 * 45 * width * 4})

"""Splits of a whole pipeline: the order, what is refused before weights load, what is put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from penstock.config import LoadConfig, ParallelConfig
from penstock.distributed import parallel_state
from penstock.engine import splits
from penstock.engine.build import prepare
from penstock.engine.splits import check_splits
from penstock.errors import ConfigError
from penstock.undo import Undo
from tests import zoo
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of, tolerance_of_pipeline


@pytest.mark.parametrize(
    ("name", "degrees", "reason"),
    [
        ("sana", {"ulysses_degree": 2}, "convolution"),
        ("sd15", {"ring_degree": 2}, "convolution"),
        ("flux", {"tensor_parallel_size": 2}, r"tensor\(2\) does not divide heads"),
        ("flux", {"pipeline_parallel_size": 64}, "each needs a block of its own"),
        ("sd15", {"pipeline_parallel_size": 2}, "no row"),
    ],
)
def test_what_a_class_cannot_do_is_refused(name: str, degrees: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_splits(zoo.build(name), ParallelConfig(**degrees))


def test_a_pipeline_without_denoiser_has_nothing_to_split() -> None:
    class Bare:
        pass

    with pytest.raises(ConfigError, match="Bare has no denoiser"):
        check_splits(Bare(), ParallelConfig(cfg_parallel_size=2))
    with pytest.raises(ConfigError, match=r"vae_patch_parallel_size\(2\): Bare has no VAE"):
        check_splits(Bare(), ParallelConfig(vae_patch_parallel_size=2))


def refused_before_loading(folder: Path) -> int:
    with pytest.raises(ConfigError, match="does not divide heads"):
        prepare(folder, LoadConfig(device="cpu"), ParallelConfig(tensor_parallel_size=2))
    return 1


def test_a_folder_is_refused_before_its_weights_load(zoo_folder: Callable[[str], Path]) -> None:
    assert run_ranks(2, refused_before_loading, zoo_folder("flux")) == [1, 1]


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def load_split(folder: Path, name: str, degrees: dict[str, int], options: dict[str, Any]) -> tuple[float, float, str]:
    """On every rank: how far its picture is from the plain one, its share of the denoiser, what its report says."""
    parallel_state.set_mesh(None)  # whatever a job before has left
    plain_pipeline = penstock.load(folder, device="cpu", offload="none", dtype=options.get("dtype", "auto"))
    plain = zoo.tensors(zoo.run(plain_pipeline, name, seed=5))
    pipeline = penstock.load(folder, device="cpu", parallel=ParallelConfig(**degrees), **options)
    share = bytes_of(pipeline.transformer) / bytes_of(plain_pipeline.transformer)
    result = zoo.tensors(zoo.run(pipeline, name, seed=5))
    placed = penstock.placed_on(pipeline)
    assert placed is not None
    told = str(placed.report())
    if degrees.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
        with pytest.raises(ConfigError, match="load_lora_weights: the denoiser is split"):
            pipeline.load_lora_weights("an adapter")
    assert parallel_state.get_world_size() == placed.mesh["world"].size
    placed.remove()
    assert not parallel_state.model_parallel_is_initialized()
    again = zoo.tensors(zoo.run(pipeline, name, seed=5))
    assert difference(again, plain) < tolerance_of_pipeline(name, seed=5)
    return difference(result, plain), share, told


@pytest.mark.parametrize(
    ("name", "degrees", "options"),
    [
        ("qwen_image", {"tensor_parallel_size": 2, "cfg_parallel_size": 2}, {"offload": "none"}),
        ("qwen_image", {"pipeline_parallel_size": 2, "ulysses_degree": 2}, {"offload": "none"}),
        ("qwen_image", {"tensor_parallel_size": 2, "ring_degree": 2}, {"max_weight_memory": "least"}),
        ("wan22", {"pipeline_parallel_size": 2, "cfg_parallel_size": 2}, {"max_weight_memory": "least"}),
        ("wan22", {"ulysses_degree": 2, "vae_patch_parallel_size": 4}, {"offload": "sequential"}),
    ],
    ids=str,
)
def test_a_loaded_pipeline_is_split_and_put_back(
    zoo_folder: Callable[[str], Path], name: str, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    for far, share, told in run_ranks(4, load_split, zoo_folder(name), name, degrees, options):
        assert far < tolerance_of_pipeline(name, seed=5)
        if options == {"offload": "none"}:
            assert share < 0.75
        assert "split " in told and "received" in told


def different_arguments() -> str:
    pipeline = zoo.build("flux")
    placed = penstock.apply(pipeline, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2))
    rank = placed.mesh["world"].rank
    with pytest.raises(penstock.RequestError, match="rank 1 of 2 was called with other arguments"):
        zoo.run(pipeline, "flux", prompt=f"a {rank}")
    first = zoo.tensors(zoo.run(pipeline, "flux", generator=None))
    placed.remove()
    return str(float(first[0].double().sum()))


def test_a_refused_call_leaves_a_pipeline_that_works_and_draws_alike() -> None:
    first, second = run_ranks(2, different_arguments)
    assert first == second


def share_a_denoiser() -> str:
    one, other = zoo.build("wan21"), zoo.build("wan21")
    other.transformer = one.transformer
    parallel = ParallelConfig(cfg_parallel_size=2)
    first = penstock.apply(one, device="cpu", offload="none", parallel=parallel)
    with pytest.raises(ConfigError) as caught:
        penstock.apply(other, device="cpu", offload="none", parallel=parallel)
    first.remove()
    penstock.apply(other, device="cpu", offload="none", parallel=parallel).remove()
    assert type(one.transformer).__name__ == "WanTransformer3DModel" and "__call__" not in vars(type(one.transformer))
    return str(caught.value)


def test_a_denoiser_is_split_once() -> None:
    for said in run_ranks(2, share_a_denoiser):
        assert said.startswith("transformer is placed already, as part of another WanPipeline.")


def fail_half_way() -> bool:
    parallel_state.set_mesh(None)
    pipeline = zoo.build("wan21")
    parallel = ParallelConfig(ulysses_degree=2)
    calls = splits.apply_together

    def fail(*_: Any) -> Undo:
        raise ConfigError("it cannot be.")

    splits.apply_together = fail
    try:
        with pytest.raises(ConfigError, match="it cannot be"):
            penstock.apply(pipeline, device="cpu", offload="none", parallel=parallel)
    finally:
        splits.apply_together = calls
    assert penstock.placed_on(pipeline) is None
    assert not parallel_state.model_parallel_is_initialized()
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in pipeline.transformer.modules()]
    assert not any(hooks)
    penstock.apply(pipeline, device="cpu", offload="none", parallel=parallel).remove()
    return True


def test_what_fails_half_way_leaves_nothing() -> None:
    assert run_ranks(2, fail_half_way) == [True, True]


def share_the_mesh_in_use() -> None:
    one, other = zoo.build("wan21"), zoo.build("flux")
    first = penstock.apply(one, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2))
    second = penstock.apply(other, device="cpu", offload="none", parallel=ParallelConfig(ring_degree=2))
    first.remove()
    assert parallel_state.get_mesh() is second.mesh
    second.remove()


def test_removing_one_pipeline_leaves_the_mesh_of_another() -> None:
    run_ranks(2, share_the_mesh_in_use)


def refused(degrees: dict[str, Any]) -> float:
    """On every rank: how far a pipeline whose weights only memory has is from itself, after it could not be placed."""
    pipeline = zoo.build("qwen_image")
    plain = list(zoo.tensors(zoo.run(pipeline, "qwen_image")))
    parallel = ParallelConfig(**degrees)
    with pytest.raises(ConfigError, match="below the least that works"):
        penstock.apply(pipeline, device="cpu", offload="layerwise", max_weight_memory="1KiB", parallel=parallel)
    with penstock.apply(pipeline, device="cpu", offload="none", parallel=parallel):
        pass
    return difference(list(zoo.tensors(zoo.run(pipeline, "qwen_image"))), plain)


@pytest.mark.parametrize(
    "degrees",
    [{"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}, {"use_hsdp": True, "hsdp_shard_size": 2}],
    ids=str,
)
def test_what_is_refused_or_removed_leaves_the_pipeline_as_it_was(degrees: dict[str, Any]) -> None:
    assert run_ranks(2, refused, degrees, timeout_s=60) == [0.0, 0.0]


class Alternating:
    """Encodes anew before each of the two calls of a step, which leave room for one component at a time."""

    def __init__(self) -> None:
        pipeline = zoo.build("wan21")
        self.transformer, self.text_encoder = pipeline.transformer, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler

    @torch.inference_mode()
    def __call__(self) -> list[torch.Tensor]:
        """Make two steps."""
        sample = torch.randn(
            1, self.transformer.config.in_channels, 1, 4, 6, generator=torch.Generator().manual_seed(0)
        )
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            outputs = []
            for tokens in ([1, 2, 3, 4], [5, 6, 7, 8]):
                states = self.text_encoder(torch.tensor([tokens]))[0]
                outputs.append(self.transformer(sample, t[None], states, return_dict=False)[0])
            guided = outputs[0] + 3 * (outputs[0] - outputs[1])
            sample = self.scheduler.step(guided, t, sample, return_dict=False)[0]
        return [sample]


def alternate(options: dict[str, Any]) -> float:
    """On every rank: how far two branches on two ranks that share weights are from one rank's, as a share of what is
    allowed, encoders in between."""
    pipeline = Alternating()
    plain = pipeline()
    parallel = ParallelConfig(use_hsdp=True, cfg_parallel_size=2)
    with penstock.apply(pipeline, device="cpu", parallel=parallel, **options):
        found = pipeline()
    assert not any(module._forward_pre_hooks for module in pipeline.text_encoder.modules())
    other = Alternating()
    return difference(found, plain) / tolerance_of([other.transformer, other.text_encoder], other, plain)


@pytest.mark.parametrize(
    "options", [{"offload": "layerwise", "max_weight_memory": "least"}, {"offload": "sequential"}], ids=str
)
def test_what_runs_between_the_calls_of_a_step_gathers_at_the_same_place(options: dict[str, Any]) -> None:
    for share in run_ranks(2, alternate, options):
        assert share < 1

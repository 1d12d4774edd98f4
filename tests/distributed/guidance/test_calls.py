"""Guidance over ranks: unmodified pipelines give the picture of one rank, and each rank does its part of the work."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.guidance.calls import apply_guidance
from penstock.distributed.guidance.futures import FutureTensor
from penstock.distributed.guidance.rounds import rounds_of
from penstock.distributed.mesh import build_mesh
from penstock.undo import Undo
from tests import tolerance, zoo
from tests.ranks import run_ranks

BY_TURNS = ("flux2_klein", "chroma", "lumina2", "wan21", "wan22", "hunyuan_video15")
IN_ONE_BATCH = ("qwen_image", "z_image", "sd3", "sana", "sdxl", "sd15", "ltx", "ltx_i2v", "cogvideox", "ltx2")
UNGUIDED = ("flux", "flux_img2img", "flux2", "stranger")
THREE_BRANCHES: dict[str, Any] = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 1.5,
    "audio_stg_scale": 1.5,
    "modality_scale": 2.0,
    "audio_modality_scale": 2.0,
    "spatio_temporal_guidance_blocks": [1],
}


@dataclass
class Run:
    """What one run of a pipeline did on one rank.

    Attributes:
        values: The tensors of its output.
        num_calls: Times a denoiser was executed.
        output_bytes: What those executions returned.
        received_bytes: From other ranks.
    """

    values: list[np.ndarray[Any, Any]] = field(default_factory=list)
    num_calls: int = 0
    output_bytes: int = 0
    received_bytes: int = 0


class Guided:
    """A pipeline of the zoo whose runs are watched, with guidance over ranks or, at first, without."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.pipe = name, zoo.build(name)
        self.group = build_mesh(ParallelConfig(cfg_parallel_size=size), "cpu")["cfg"]
        self.last = Run()
        self.undos: list[Undo] = []
        for denoiser in self.denoisers:
            denoiser.register_forward_hook(self._watch)

    @property
    def denoisers(self) -> list[nn.Module]:
        names = ("transformer", "transformer_2", "unet", "painter")
        return [part for name in names if isinstance(part := self.pipe.components.get(name), nn.Module)]

    def _watch(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        self.last.num_calls += 1
        self.last.output_bytes += sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    def apply(self, **options: Any) -> None:
        self.undos = [apply_guidance(denoiser, self.group, **options) for denoiser in self.denoisers]

    def run(self, **overrides: Any) -> Run:
        self.last = Run()
        self.group.traffic.clear()
        with rounds_of(self.group).run():
            tensors = zoo.tensors(zoo.run(self.pipe, self.name, **overrides))
        self.last.values = [tensor.numpy() for tensor in tensors]
        self.last.received_bytes = sum(self.group.traffic.received_bytes.values())
        return self.last

    def reference(self, **overrides: Any) -> Run:
        """The plain pipeline, on the first rank only."""
        return self.run(**overrides) if self.group.rank == 0 else Run()


def whole(name: str, size: int, overrides: dict[str, Any]) -> list[Run]:
    guided = Guided(name, size)
    plain = guided.reference(**overrides)
    guided.apply()
    return [plain, guided.run(**overrides), guided.run(**overrides)]


def difference(left: Run, right: Run) -> float:
    return tolerance.difference(*(list(map(torch.from_numpy, run.values)) for run in (left, right)))


def compare(name: str, size: int, is_equal: bool, **overrides: Any) -> tuple[Run, list[list[Run]]]:
    """Compares every rank's runs with the first rank's plain one, and returns that one and all the others."""
    allowed = 0.0 if is_equal else tolerance.tolerance_of_pipeline(name, **overrides)
    by_rank = run_ranks(size, whole, name, size, overrides)
    plain = by_rank[0][0]
    for _, first, second in by_rank:
        assert difference(first, plain) <= allowed
        assert difference(second, plain) <= allowed
    return plain, [runs[1:] for runs in by_rank]


@pytest.mark.parametrize("name", BY_TURNS)
def test_single_calls_go_by_turns(name: str) -> None:
    plain, by_rank = compare(name, 2, is_equal=True)
    num_denoisers = 2 if name == "wan22" else 1
    for rank, (first, second) in enumerate(by_rank):
        assert second.num_calls == plain.num_calls // 2
        assert second.received_bytes == second.output_bytes == plain.output_bytes // 2
        assert first.num_calls == second.num_calls + rank * num_denoisers  # each learnt what it returns once


@pytest.mark.parametrize("name", IN_ONE_BATCH)
def test_a_batch_is_cut(name: str) -> None:
    plain, by_rank = compare(name, 2, is_equal=False)
    for _, run in by_rank:
        assert run.num_calls == plain.num_calls
        assert run.received_bytes == run.output_bytes == plain.output_bytes // 2


@pytest.mark.parametrize("name", UNGUIDED)
def test_without_guidance_one_rank_computes(name: str) -> None:
    plain, by_rank = compare(name, 2, is_equal=True)
    assert [second.num_calls for _, second in by_rank] == [plain.num_calls, 0]
    assert [second.received_bytes for _, second in by_rank] == [0, plain.output_bytes]


@pytest.mark.parametrize(("size", "num_calls"), [(2, [4, 2]), (3, [2, 2, 2]), (4, [2, 2, 2, 0])])
def test_three_predictions_per_step(size: int, num_calls: list[int]) -> None:
    plain, by_rank = compare("ltx2", size, is_equal=True, **THREE_BRANCHES)
    assert plain.num_calls == 6
    assert [second.num_calls for _, second in by_rank] == num_calls
    for _, second in by_rank:
        assert second.received_bytes == plain.output_bytes - second.output_bytes


def test_predictions_in_one_batch_and_by_turns() -> None:
    overrides = {**THREE_BRANCHES, "guidance_scale": 3.0, "audio_guidance_scale": 3.0}
    plain, by_rank = compare("ltx2", 2, is_equal=False, **overrides)
    assert plain.num_calls == 6  # of a batch of two, and twice of one sample
    assert [second.num_calls for _, second in by_rank] == [4, 4]


def test_a_batch_that_is_smaller_than_the_group_goes_by_turns() -> None:
    _, by_rank = compare("qwen_image", 4, is_equal=True)
    assert [second.num_calls for _, second in by_rank] == [2, 2, 0, 0]


def test_several_pictures_over_more_ranks() -> None:
    _, by_rank = compare("sd3", 4, is_equal=False, num_images_per_prompt=2)
    assert [second.num_calls for _, second in by_rank] == [2, 2, 2, 2]


def test_a_batch_that_the_group_does_not_divide_stays_whole() -> None:
    _, by_rank = compare("sd15", 3, is_equal=True)
    assert [second.num_calls for _, second in by_rank] == [2, 0, 0]


def test_prompts_of_different_lengths_are_learnt_once() -> None:
    overrides = {
        "prompt": "a red fox",
        "negative_prompt": "a large white house, a small boat",
        "num_inference_steps": 3,
    }
    plain, by_rank = compare("qwen_image", 2, is_equal=True, **overrides)
    assert plain.num_calls == 6
    assert [first.num_calls for first, _ in by_rank] == [3, 4]
    assert [second.num_calls for _, second in by_rank] == [3, 3]


def switching() -> list[list[Run]]:
    guided = Guided("wan21", 2)
    scales = (1.0, 4.0, 1.0, 5.0)
    plain = [guided.reference(guidance_scale=scale, num_inference_steps=3) for scale in scales]
    guided.apply()
    return [plain, [guided.run(guidance_scale=scale, num_inference_steps=3) for scale in scales]]


def test_guidance_goes_on_and_off() -> None:
    (plain, first), (_, second) = run_ranks(2, switching)
    assert [difference(a, b) for a, b in zip(first, plain, strict=True)] == [0, 0, 0, 0]
    assert [difference(a, b) for a, b in zip(second, plain, strict=True)] == [0, 0, 0, 0]
    assert [run.num_calls for run in first] == [3, 3, 3, 3]
    assert [run.num_calls for run in second] == [1, 3, 0, 3]


def broken(name: str, overrides: dict[str, Any]) -> list[Run]:
    """Everything arrives from other ranks as zeros."""

    def all_gather(self: Group, tensor: Tensor) -> list[Tensor]:
        return [tensor if rank == self.rank else torch.zeros_like(tensor) for rank in range(self.size)]

    def broadcast(self: Group, tensor: Tensor, source: int) -> Tensor:
        return tensor if self.rank == source else tensor.zero_()

    with patch.object(Group, "all_gather", all_gather), patch.object(Group, "broadcast", broadcast):
        return whole(name, 2, overrides)


@pytest.mark.parametrize(
    ("name", "overrides"), [("wan21", {}), ("sd3", {}), ("ltx2", THREE_BRANCHES), ("ltx_i2v", {}), ("flux", {})]
)
def test_without_the_exchange_the_picture_is_another(name: str, overrides: dict[str, Any]) -> None:
    (plain, first, second), (_, *others) = run_ranks(2, broken, name, overrides)
    allowed = tolerance.tolerance_of_pipeline(name, **overrides)
    assert max(difference(run, plain) for run in (first, second, *others)) > 10 * allowed


def latents() -> Any:
    guided = Guided("wan21", 2)
    guided.apply()
    wanted = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 2}
    guided.run(**wanted)
    with rounds_of(guided.group).run():
        result = zoo.run(guided.pipe, guided.name, **wanted).frames
        was_pending = isinstance(result, FutureTensor) and result.is_pending
    assert isinstance(result, FutureTensor) and not result.is_pending
    return was_pending, result.numpy()


def test_a_result_may_leave_the_pipeline_before_it_is_there_and_the_end_brings_it() -> None:
    (first_pending, first), (second_pending, second) = run_ranks(2, latents)
    assert first_pending and second_pending
    assert np.array_equal(first, second)


def cached() -> list[Run]:
    """Half of the steps take the blocks' results from the step before, in a cache for each prediction."""

    def once(guided: Guided) -> Run:
        num_blocks = [0]
        attention = guided.pipe.transformer.blocks[-2].attn1
        handle = attention.register_forward_pre_hook(lambda *_: num_blocks.__setitem__(0, num_blocks[0] + 1))
        guided.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.8))
        run = guided.run(num_inference_steps=6)
        guided.pipe.transformer.disable_cache()
        handle.remove()
        run.num_calls = num_blocks[0]
        return run

    guided = Guided("wan21", 2)
    plain = once(guided)
    guided.apply()
    return [plain, once(guided)]


def test_caches_of_predictions_stay_on_their_ranks() -> None:
    for plain, run in run_ranks(2, cached):
        assert 2 < plain.num_calls < 12  # some were taken from the cache
        assert difference(run, plain) == 0


def sharded(guidance_scale: float) -> list[Run]:
    guided = Guided("wan21", 2)
    plain = guided.reference(guidance_scale=guidance_scale)
    process_group = guided.group.process_group
    assert process_group is not None
    mesh = DeviceMesh.from_group(process_group, "cpu")
    transformer = guided.pipe.transformer
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    guided.apply(lockstep=True)
    return [plain, guided.run(guidance_scale=guidance_scale), guided.run(guidance_scale=guidance_scale)]


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_weights_that_are_sharded_over_the_ranks(guidance_scale: float) -> None:
    by_rank = run_ranks(2, sharded, guidance_scale, timeout_s=60)
    plain = by_rank[0][0]
    for _, first, second in by_rank:
        assert difference(first, plain) == difference(second, plain) == 0
        assert second.num_calls == 2


class Echo(nn.Module):
    """Its sample has a name that elsewhere belongs to the prompt."""

    num_calls = 0

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        self.num_calls += 1
        return input_ids * encoder_hidden_states.sum()


def echoes() -> Any:
    denoisers = Echo(), Echo()
    group = build_mesh(ParallelConfig(cfg_parallel_size=2), "cpu")["cfg"]
    for denoiser in denoisers:
        apply_guidance(denoiser, group)
    heard = []
    for length in (3, 5, 3, 5, 5):
        sample = torch.arange(float(length))[None]
        with rounds_of(group).run():
            left = denoisers[0](sample, torch.ones(7))
            difference = left - denoisers[1](input_ids=sample, encoder_hidden_states=sample)
        heard.append(difference.tolist() == ((7 - sample.sum()) * sample).tolist())
    return heard, [denoiser.num_calls for denoiser in denoisers]


def test_two_denoisers_take_turns_and_a_sample_of_another_shape_is_learnt() -> None:
    (first, num_first), (second, num_second) = run_ranks(2, echoes)
    assert all(first + second)
    assert (num_first, num_second) == ([5, 2], [2, 5])


GROUP = Group("cfg", 0, (0, 1), None)


def test_a_denoiser_looks_like_itself_and_is_itself_again(tmp_path: Any) -> None:
    pipe = zoo.build("wan21")
    transformer, stock = pipe.transformer, type(pipe.transformer)
    undo = apply_guidance(transformer, GROUP)
    assert type(transformer) is stock
    assert transformer.config == zoo.build("wan21").transformer.config
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).transformer) is stock
    assert type(copy.deepcopy(transformer)) is type(pickle.loads(pickle.dumps(transformer))) is stock
    undo.run()
    undo.run()
    assert type(transformer) is stock


def test_one_rank_changes_nothing() -> None:
    pipe = zoo.build("wan21")
    stock = type(pipe.transformer)
    apply_guidance(pipe.transformer, Group("cfg", 0, (0,), None)).run()
    assert type(pipe.transformer) is stock


def interrupted() -> list[Run]:
    """A rank's call fails in between two runs."""
    guided = Guided("wan21", 2)
    plain = guided.reference()
    guided.apply()
    guided.run()
    handle = guided.pipe.transformer.register_forward_hook(stop)
    if guided.group.rank == 0:
        with pytest.raises(MemoryError, match="no room"):
            guided.run()
    handle.remove()
    return [plain, guided.run()]


def stop(*_: Any) -> None:
    raise MemoryError("no room")


def test_a_failure_reaches_the_caller_and_the_next_run_works() -> None:
    (plain, first), (_, second) = run_ranks(2, interrupted)
    assert difference(first, plain) == difference(second, plain) == 0
    assert first.num_calls == second.num_calls == 2


def removed() -> Run:
    guided = Guided("wan21", 2)
    guided.apply()
    for undo in guided.undos:
        undo.run()
    return guided.run()


def test_removed_every_rank_computes_alone() -> None:
    assert [(run.num_calls, run.received_bytes) for run in run_ranks(2, removed)] == [(4, 0), (4, 0)]


def by_itself() -> Any:
    """Rank 1 makes calls of its own, and then both make one."""
    group, denoiser = build_mesh(ParallelConfig(cfg_parallel_size=2), "cpu")["cfg"], Echo()
    apply_guidance(denoiser, group)
    group.traffic.clear()
    own = [denoiser(torch.ones(size, 3), torch.ones(3)) for size in (1, 2, 1)] if group.rank else []
    told = [type(result).__name__ for result in own], denoiser.num_calls, dict(group.traffic.num_calls)
    with rounds_of(group).run():
        return *told, denoiser(torch.ones(2, 3), torch.ones(3)).tolist()


def test_outside_of_a_run_a_rank_calls_for_itself() -> None:
    rows = [[3.0] * 3] * 2
    assert run_ranks(2, by_itself, timeout_s=30) == [([], 0, {}, rows), (["Tensor"] * 3, 3, {}, rows)]

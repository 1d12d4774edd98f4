"""The harness itself: it passes what is equal, fails what is not, and its control is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput

import penstock
from penstock import ConfigError, GenerationRequest
from penstock.config import ParallelConfig
from penstock.distributed.mesh import build_mesh
from penstock.distributed.stages import apply_stages
from penstock.engine.parity import Verification, allowed, compare, damaged_weight, record, rounded_otherwise
from penstock.models.rows.table import row_of
from tests import zoo
from tests.models.toys import Decoder
from tests.ranks import run_ranks

STAGES = ParallelConfig(pipeline_parallel_size=2)
REQUEST_OF_RANKS = GenerationRequest(prompt="red", width=32, height=32, num_inference_steps=2)
REQUEST = GenerationRequest(prompt="red", width=56, height=40, num_inference_steps=2)


def test_equal_arrays() -> None:
    (difference,) = compare({"latents": np.ones((2, 3))}, {"latents": np.ones((2, 3))})
    assert difference.max_difference == difference.relative == 0
    assert math.isinf(difference.psnr_db)
    assert difference.is_within(0)


def test_measures() -> None:
    reference = np.array([0.0, 2.0, 4.0])
    (difference,) = compare({"a": reference}, {"a": reference + np.array([0, 0, 0.4])})
    assert difference.max_difference == pytest.approx(0.4)
    assert difference.relative == pytest.approx(0.1)
    assert difference.psnr_db == pytest.approx(10 * math.log10(16 / (0.16 / 3)))
    assert difference.is_within(0.11) and not difference.is_within(0.09) and not difference.is_within(0)


@pytest.mark.parametrize(
    "candidate",
    [
        {},
        {"b": np.array([0.0, 1.0])},
        {"a": np.zeros(3)},
        {"a": np.array([0.0, np.nan])},
        {"a": np.array([0.0, np.inf])},
    ],
)
def test_missing_misshapen_and_unfinished_arrays_never_pass(candidate: dict[str, np.ndarray]) -> None:
    assert not any(d.is_within(1e9) for d in compare({"a": np.array([0.0, 1.0])}, candidate))


def test_array_that_only_the_candidate_has_never_passes() -> None:
    same, extra = compare({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)})
    assert same.is_within(0) and not extra.is_within(1e9)


def test_nothing_compared_is_not_passed() -> None:
    empty = Verification(model="m", configuration={}, tolerance=0.0, differences=(), control=())
    assert not empty.is_same and not empty.passed


def test_run_that_leaves_nothing_to_compare_is_an_error() -> None:
    class Speaks(DiffusionPipeline):
        def __init__(self) -> None:
            super().__init__()

        def __call__(self) -> BaseOutput:
            return BaseOutput(texts=["a dog"])

    with pytest.raises(penstock.GenerationError, match="there is nothing to compare"):
        record(Speaks(), {}, 0)


def test_recording_holds_latents_and_output() -> None:
    pipeline = zoo.build("flux")
    recording = record(pipeline, {"prompt": "red", "width": 56, "height": 40, "num_inference_steps": 2}, 0)
    assert set(recording) == {"latents", "images"}
    assert recording["images"].shape == (1, 40, 56, 3) and recording["images"].dtype == np.float32
    assert "decode" not in vars(pipeline.vae)


def test_recording_of_two_vaes_and_sound() -> None:
    call = dict(zoo.ENTRIES["ltx2"].call)
    recording = record(zoo.build("ltx2"), call, 0)
    assert {"latents[0]", "latents[1]", "frames", "audio"} <= set(recording)


def test_damage_is_undone() -> None:
    pipeline = zoo.build("flux")
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    with damaged_weight(pipeline) as name:
        path = name.removeprefix("transformer.")
        assert not torch.equal(pipeline.transformer.state_dict()[path], before[path])
    assert all(torch.equal(value, before[key]) for key, value in pipeline.transformer.state_dict().items())


def test_damage_needs_a_denoiser() -> None:
    class OnlyDecodes:
        def __init__(self) -> None:
            self.vae = Decoder()

    with pytest.raises(ConfigError, match="Switch the control off"), damaged_weight(OnlyDecodes()):
        pass


def test_verify_passes_and_the_control_is_noticed(zoo_folder: Callable[[str], Path]) -> None:
    verification = penstock.verify(zoo_folder("flux"), REQUEST)
    assert verification.passed and verification.is_same and verification.is_sensitive
    assert [difference.name for difference in verification.differences] == ["latents", "images"]
    assert all(difference.max_difference == 0 for difference in verification.differences)
    assert all(difference.relative > 1e-3 for difference in verification.control)
    told = json.loads(verification.to_json())
    assert told["passed"] is True and told["differences"][0]["is_equal"] is True


@pytest.mark.parametrize(
    ("name", "dtype"), [("flux", torch.float32), ("wan21", torch.float32), ("flux", torch.bfloat16)], ids=str
)
def test_a_run_that_rounds_otherwise_is_allowed_and_a_damaged_one_is_not(name: str, dtype: torch.dtype) -> None:
    pipeline, call = zoo.build(name, dtype), dict(zoo.ENTRIES[name].call)
    reference = record(pipeline, call, 0)
    with rounded_otherwise(pipeline):
        moved = compare(reference, record(pipeline, call, 0))
    tolerance = allowed(moved, dtype)
    assert all(0 < difference.relative <= tolerance for difference in moved)
    with damaged_weight(pipeline):
        assert not any(item.is_within(tolerance) for item in compare(reference, record(pipeline, call, 0)))
    assert all(difference.is_equal for difference in compare(reference, record(pipeline, call, 0)))
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())


def test_a_plain_run_that_is_not_finite_allows_no_more_than_the_last_units() -> None:
    moved = compare({"a": np.array([1.0, np.nan])}, {"a": np.array([1.0, np.nan])})
    assert allowed(moved, torch.float32) == allowed((), torch.float32) == 4 * torch.finfo(torch.float32).eps


def verified(folder: Path, degrees: dict[str, int]) -> str:
    """The whole verification on one rank, with its control."""
    verification = penstock.verify(folder, REQUEST_OF_RANKS, parallel=ParallelConfig(**degrees), device="cpu")
    assert verification.is_same, verification.differences
    assert verification.is_sensitive, verification.control
    return str((verification.differences, verification.control))


@pytest.mark.parametrize(
    ("name", "size", "degrees"),
    [
        ("wan21", 2, {"pipeline_parallel_size": 2}),
        ("qwen_image", 2, {"pipeline_parallel_size": 2}),
        ("wan21", 2, {"cfg_parallel_size": 2}),
        ("qwen_image", 4, {"tensor_parallel_size": 2, "ulysses_degree": 2}),
    ],
    ids=str,
)
def test_ranks_verify_together_and_agree(
    zoo_folder: Callable[[str], Path], name: str, size: int, degrees: dict[str, int]
) -> None:
    told = run_ranks(size, verified, zoo_folder(name), degrees)
    assert len(set(told)) == 1


def stages_damaged() -> str:
    """The name of the weight that this stage damages."""
    pipeline = zoo.build("wan21")
    apply_stages(pipeline.transformer, row_of(pipeline.transformer), build_mesh(STAGES, "cpu")["pipeline"])
    with damaged_weight(pipeline) as name:
        return name


def test_each_stage_damages_a_block_of_its_own() -> None:
    first, second = run_ranks(2, stages_damaged)
    assert first.startswith("transformer.blocks.0.")
    assert second.startswith("transformer.blocks.") and not second.startswith("transformer.blocks.0.")


def test_verify_fails_what_differs(zoo_folder: Callable[[str], Path]) -> None:
    """bfloat16 is not float32: the same harness, another dtype, must say so."""
    options = {"dtype": "bfloat16", "reference_dtype": "float32"}
    strict = penstock.verify(zoo_folder("flux"), REQUEST, control=False, **options)
    assert not strict.passed
    loose = penstock.verify(zoo_folder("flux"), REQUEST, control=False, tolerance=1.0, **options)
    assert loose.passed


def test_tolerance_that_cannot_notice_the_control_fails(zoo_folder: Callable[[str], Path]) -> None:
    verification = penstock.verify(zoo_folder("flux"), REQUEST, tolerance=1e9)
    assert verification.is_same and not verification.is_sensitive and not verification.passed


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_tolerance_is_a_number_from_0_up(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="is not a number from 0 up"):
        penstock.verify("demo", REQUEST, tolerance=tolerance)


def test_one_picture_is_compared() -> None:
    with pytest.raises(penstock.RequestError, match="num_images=2: verify compares one picture"):
        penstock.verify("demo", GenerationRequest(prompt="x", num_images=2))

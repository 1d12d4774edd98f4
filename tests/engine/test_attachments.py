"""What others put on a pipeline is right with a feature, or refused by name: before and after it is placed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import (
    StableDiffusionSAGPipeline,
)

import penstock
from penstock.config import ParallelConfig
from penstock.engine import attachments
from penstock.errors import ConfigError, UsageError
from penstock.models.attachments import Trait
from tests import zoo
from tests.engine import foreign
from tests.ranks import RankError, run_ranks

CLOSE = 1e-4
THOROUGH = pytest.mark.thorough
STREAMING = {"offload": "layerwise", "max_weight_memory": "least"}


def pictures(pipeline: Any, name: str, **given: Any) -> list[Any]:
    return [tensor.numpy() for tensor in zoo.tensors(zoo.run(pipeline, name, num_inference_steps=6, **given))]


def gap(left: list[Any], right: list[Any]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", foreign.WEIGHT_OWNERS)
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_who_owns_weights_is_refused_before_anything_changes(kind: str, component: str) -> None:
    pipeline = zoo.build("flux")
    foreign.WEIGHT_OWNERS[kind](getattr(pipeline, component))
    states = [(dict(vars(module)), dict(module._parameters)) for module in pipeline.transformer.modules()]
    for options in (STREAMING, {"offload": "sequential"}):
        with pytest.raises(ConfigError, match=rf"{component}.*does not go with"):
            penstock.apply(pipeline, **options)
    assert penstock.placed_on(pipeline) is None
    for module, (before, weights) in zip(pipeline.transformer.modules(), states, strict=True):
        assert vars(module) == before and all(module._parameters[name] is weights[name] for name in weights)


@pytest.mark.parametrize("kind", foreign.WEIGHT_OWNERS)
def test_who_comes_to_own_weights_later_is_refused_at_the_next_call(kind: str) -> None:
    pipeline = zoo.build("flux")
    placed = penstock.apply(pipeline, **STREAMING)
    plain = pictures(pipeline, "flux")
    try:
        foreign.WEIGHT_OWNERS[kind](pipeline.transformer.transformer_blocks)
    except UsageError:  # it moves what refuses to be moved
        pass
    else:
        with pytest.raises(
            ConfigError, match=r"transformer\.transformer_blocks.*does not go with (a placed|weights that)"
        ):
            pictures(pipeline, "flux")
    placed.remove()
    if kind != "casting":
        assert gap(pictures(pipeline, "flux"), plain) == 0


def test_group_offload_to_disk_is_refused_and_goes_on_working(tmp_path: Path) -> None:
    pipeline, plain = zoo.build("flux"), pictures(zoo.build("flux"), "flux")
    foreign.group_offload(pipeline.transformer, "block_level", tmp_path)
    with pytest.raises(ConfigError, match="group offloading"):
        penstock.apply(pipeline, **STREAMING)
    assert gap(pictures(pipeline, "flux"), plain) == 0


@pytest.mark.parametrize("kind", ["first_block", *(pytest.param(k, marks=THOROUGH) for k in ("taylorseer", "pyramid"))])
def test_caches_on_streamed_weights_are_right(kind: str) -> None:
    stock = zoo.build("wan21")
    foreign.cache(stock, kind)
    expected, plain = pictures(stock, "wan21"), pictures(zoo.build("wan21"), "wan21")
    assert gap(expected, plain) > 100 * CLOSE  # the cache does something
    pipeline = zoo.build("wan21")
    with penstock.apply(pipeline, **STREAMING):
        foreign.cache(pipeline, kind)
        assert gap(pictures(pipeline, "wan21"), expected) == 0


@pytest.mark.parametrize(
    ("put_on", "is_before"),
    [
        (foreign.count_in_blocks, True),
        pytest.param(foreign.count_in_blocks, False, marks=THOROUGH),
        pytest.param(foreign.count_by_attribute, True, marks=THOROUGH),
        pytest.param(foreign.count_by_attribute, False, marks=THOROUGH),
        pytest.param(foreign.exchange_blocks, True, marks=THOROUGH),
        pytest.param(foreign.inject_by_hook, False, marks=THOROUGH),
    ],
)
def test_calls_that_share_state_are_not_made_together(put_on: Callable[[Any], None], is_before: bool) -> None:
    stock = zoo.build("wan21")
    put_on(stock)
    expected = pictures(stock, "wan21")
    pipeline = zoo.build("wan21")
    if is_before:
        put_on(pipeline)
    with penstock.apply(pipeline, **STREAMING, share_blocks=True) as placed:
        if not is_before:
            pictures(pipeline, "wan21")
            put_on(pipeline)
        assert gap(pictures(pipeline, "wan21"), expected) == 0
        assert any("keep something from call to call" in note for note in placed.report().notes)


def test_calls_that_share_state_made_together_are_wrong() -> None:
    stock = zoo.build("wan21")
    foreign.count_in_blocks(stock)
    expected = pictures(stock, "wan21")
    pipeline = zoo.build("wan21")
    foreign.count_in_blocks(pipeline)
    blind = patch("penstock.distributed.guidance.deferral.state_of_others", lambda attached: "")
    with blind, penstock.apply(pipeline, **STREAMING, share_blocks=True):
        assert gap(pictures(pipeline, "wan21"), expected) > 100 * CLOSE


def test_a_wrapper_without_state_still_shares_blocks() -> None:
    pipeline = zoo.build("wan21")
    foreign.timed(pipeline)
    with penstock.apply(pipeline, **STREAMING, share_blocks=True) as placed:
        pictures(pipeline, "wan21")
        assert placed.report().saved_bytes > 0


def on_ranks(name: str, degrees: dict[str, Any], put_on: Callable[[Any], Any], is_before: bool, given: Any) -> str:
    """What became of it on this rank: "right", "wrong", or the words of the refusal."""
    stock = zoo.build(name)
    put_on(stock)
    expected = pictures(stock, name, **given)
    plain = pictures(zoo.build(name), name, **given)
    pipeline = zoo.build(name)
    if is_before:
        put_on(pipeline)
    offload = "sharded" if degrees.get("use_hsdp") else "none"
    try:
        placed = penstock.apply(pipeline, parallel=ParallelConfig(**degrees), device="cpu", offload=offload)
    except ConfigError as error:
        return f"not placed: {error}"
    try:
        if not is_before:
            put_on(pipeline)
        return "right" if gap(pictures(pipeline, name, **given), expected) < CLOSE else "wrong"
    except ConfigError as error:
        refusal = str(error)
    finally:
        placed.remove()
    if not is_before:
        return refusal
    for denoiser in foreign.denoisers(pipeline):
        if getattr(denoiser, "is_cache_enabled", False):
            denoiser.disable_cache()
            if gap(pictures(pipeline, name, **given), plain) > CLOSE:
                return f"broken after: {refusal}"
    return refusal


def cached(kind: str) -> Callable[[Any], None]:
    return functools.partial(foreign.cache, kind=kind)


CFG, ULYSSES, RING = {"cfg_parallel_size": 2}, {"ulysses_degree": 2}, {"ring_degree": 2}
STAGES, SHARDS = {"pipeline_parallel_size": 2}, {"use_hsdp": True, "hsdp_shard_size": 2}
# what, pipeline, degrees, put on before, arguments, what becomes of it
CASES: list[Any] = [
    ("first_block", "ltx", CFG, False, {}, "FirstBlockCache.*where a batch is cut"),
    ("first_block", "flux", ULYSSES, False, {}, "FirstBlockCache.*ulysses_degree"),
    ("first_block", "flux", STAGES, True, {}, "not placed: .*FirstBlockCache.*pipeline_parallel_size"),
    ("pyramid", "wan21", CFG, True, {}, "PyramidAttentionBroadcast.*by turns"),
]
MORE_CASES: list[Any] = [
    ("first_block", "wan21", CFG, False, {}, "right"),
    ("first_block", "cogvideox", CFG, False, {}, "FirstBlockCache.*where a batch is cut"),
    ("first_block", "flux", CFG, True, {"num_images_per_prompt": 2}, "FirstBlockCache.*where a batch is cut"),
    ("first_block", "flux", ULYSSES, True, {}, "not placed: .*FirstBlockCache.*ulysses_degree"),
    ("first_block", "wan21", ULYSSES, False, {}, "FirstBlockCache.*ulysses_degree"),
    ("first_block", "flux", RING, False, {}, "FirstBlockCache.*ring_degree"),
    ("first_block", "wan21", STAGES, False, {}, "FirstBlockCache.*pipeline_parallel_size"),
    ("first_block", "wan21", SHARDS, False, {}, "right"),
    ("mag", "wan21", STAGES, True, {}, "not placed: .*MagCache.*pipeline_parallel_size"),
    ("mag", "wan21", STAGES, False, {}, "right"),
    ("mag", "wan21", ULYSSES, False, {}, "right"),
    ("taylorseer", "wan21", CFG, True, {}, "right"),
    ("pyramid", "wan22", CFG, False, {}, "PyramidAttentionBroadcast.*by turns"),
    ("pyramid", "wan21", ULYSSES, False, {}, "right"),
    ("faster", "wan21", CFG, False, {}, "FasterCache.*by turns"),
]


@pytest.mark.parametrize(
    ("kind", "name", "degrees", "is_before", "given", "expected"),
    [*CASES, *(pytest.param(*case, marks=THOROUGH) for case in MORE_CASES)],
    ids=lambda value: str(value)[:30] if isinstance(value, (str, dict)) else None,
)
def test_a_cache_over_ranks(kind: str, name: str, degrees: Any, is_before: bool, given: Any, expected: str) -> None:
    found = run_ranks(2, on_ranks, name, degrees, cached(kind), is_before, given, timeout_s=60)
    for text in found:
        assert re.match(expected if expected == "right" else f"(?s).*{expected}", text), found


@pytest.mark.parametrize(
    ("put_on", "name", "degrees", "is_before"),
    [
        (foreign.count_by_attribute, "chroma", CFG, False),
        (foreign.exchange_blocks, "flux", ULYSSES, True),
        pytest.param(foreign.count_around, "ltx", CFG, True, marks=THOROUGH),
        pytest.param(foreign.count_in_blocks, "flux", ULYSSES, True, marks=THOROUGH),
        pytest.param(foreign.exchange_blocks, "wan21", CFG, True, marks=THOROUGH),
        pytest.param(foreign.inject_by_hook, "flux2_klein", CFG, False, marks=THOROUGH),
        pytest.param(foreign.strange_hook, "wan21", RING, True, marks=THOROUGH),
        pytest.param(foreign.count_in_blocks, "wan21", STAGES, True, marks=THOROUGH),
    ],
)
def test_what_nobody_knows_is_refused_over_ranks(put_on: Any, name: str, degrees: Any, is_before: bool) -> None:
    found = run_ranks(2, on_ranks, name, degrees, put_on, is_before, {}, timeout_s=60)
    assert all("does not go with" in text and text.startswith("not placed") is is_before for text in found), found


@pytest.mark.parametrize("degrees", [CFG, pytest.param(ULYSSES, marks=THOROUGH)])
def test_a_wrapper_without_state_is_right_over_ranks(degrees: Any) -> None:
    assert run_ranks(2, on_ranks, "wan21", degrees, foreign.timed, True, {}, timeout_s=60) == ["right"] * 2


def unwatched(name: str, kind: str) -> str:
    nothing: Any = {feature: {} for feature in attachments.REFUSED}
    with patch.object(attachments, "REFUSED", nothing):
        return on_ranks(name, CFG, cached(kind), False, {})


@pytest.mark.parametrize(("name", "kind"), [("wan21", "pyramid"), pytest.param("wan21", "faster", marks=THOROUGH)])
def test_without_the_refusal_the_picture_is_wrong(name: str, kind: str) -> None:
    assert "wrong" in run_ranks(2, unwatched, name, kind, timeout_s=60)


def on_one_rank_only() -> str:
    pipeline = zoo.build("flux")
    placed = penstock.apply(pipeline, parallel=ParallelConfig(**ULYSSES), device="cpu", offload="none")
    if placed.mesh["world"].rank == 0:
        foreign.cache(pipeline, "first_block")
    try:
        pictures(pipeline, "flux")
    except penstock.PenstockError as error:
        return str(error)
    finally:
        placed.remove()
    return "went through"


@THOROUGH
def test_what_is_on_one_rank_alone_leaves_nobody_waiting() -> None:
    with pytest.raises(RankError, match="rank 1: ended"):  # by its watch, which tells why
        run_ranks(2, on_one_rank_only, timeout_s=60)


def test_every_trait_is_refused_somewhere() -> None:
    assert {trait for refused in attachments.REFUSED.values() for trait in refused} == set(Trait)


def self_attention_guidance() -> str:
    base = zoo.build("sd15")
    pipeline = StableDiffusionSAGPipeline(
        **{**base.components, "scheduler": DDIMScheduler.from_config(base.scheduler.config)},
        requires_safety_checker=False,
    )
    with penstock.apply(pipeline, parallel=ParallelConfig(**CFG), device="cpu", offload="none"):
        try:
            pipeline("a fox", width=64, height=64, num_inference_steps=2, output_type="pt")
        except ConfigError as error:
            return str(error)
    return "went through"


def test_attention_maps_that_are_kept_for_the_other_prediction_are_refused() -> None:
    for text in run_ranks(2, self_attention_guidance, timeout_s=60):
        assert "attn1 has an attention processor that keeps state" in text and "cfg_parallel_size" in text

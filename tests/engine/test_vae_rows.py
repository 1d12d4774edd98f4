"""A pipeline whose VAE is spread by rows: the plain picture, wherever the weights are, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import penstock
from penstock.config import ParallelConfig
from penstock.distributed import parallel_state
from penstock.engine.splits import check_splits
from penstock.errors import ConfigError
from tests import zoo
from tests.distributed.sequences import difference
from tests.distributed.tiled_vaes import is_plain
from tests.ranks import run_ranks

TILES = {"vae_parallel_mode": "tile"}
STREAMED = {"offload": "layerwise", "max_weight_memory": "least"}


def by_rows(name: str, options: dict[str, Any], degrees: dict[str, Any]) -> tuple[bool, list[str], int, bool]:
    """Whether the picture is the plain one, the notes, messages, and whether it came back plain."""
    parallel_state.set_mesh(None)
    pipe = zoo.build(name)
    plain = list(zoo.tensors(zoo.run(pipe, name, seed=5)))
    parallel = ParallelConfig(vae_patch_parallel_size=dist.get_world_size(), **degrees)
    with penstock.apply(pipe, device="cpu", parallel=parallel, **options) as placed:
        result = list(zoo.tensors(zoo.run(pipe, name, seed=5)))
        report = placed.report()
        if options["offload"] != "none":
            assert report.peak_bytes <= report.plan.promised_bytes
    num_trades = sum(item.num_calls for item in report.traffic if item.operation == "trade")
    again = list(zoo.tensors(zoo.run(pipe, name, seed=5)))
    is_right = is_plain(difference(result, plain), pipe.vae, lambda: zoo.tensors(zoo.run(pipe, name, seed=5))[0])
    return is_right, list(report.notes), num_trades, difference(again, plain) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "num_ranks"),
    [
        ("flux_img2img", STREAMED, 2),
        ("qwen_image", {"offload": "sequential"}, 2),
        pytest.param("flux_img2img", {"offload": "none"}, 2, marks=pytest.mark.thorough),
        pytest.param("wan21", STREAMED, 4, marks=pytest.mark.thorough),
        pytest.param("ltx2", STREAMED, 2, marks=pytest.mark.thorough),
        pytest.param("sdxl", {"offload": "sequential"}, 4, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_the_picture_is_the_plain_one(name: str, options: dict[str, Any], num_ranks: int) -> None:
    for is_right, notes, num_trades, is_back in run_ranks(num_ranks, by_rows, name, options, {}):
        assert is_right and is_back
        assert any(f"by rows of the plain picture, over {num_ranks} ranks" in note for note in notes)
        assert not any("whole on each" in note for note in notes), notes
        assert num_trades > 20


def test_tiles_are_used_where_they_are_asked_for() -> None:
    for _, notes, num_trades, _ in run_ranks(2, by_rows, "flux_img2img", {"offload": "none"}, TILES):
        assert any("in tiles, over 2 ranks" in note for note in notes)
        assert not num_trades


def test_modes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"vae_parallel_mode='rows' is no mode. Use patch, tile\."):
        ParallelConfig(vae_patch_parallel_size=2, vae_parallel_mode="rows")
    with pytest.raises(ConfigError, match="has no effect on one rank. Give --vae-patch-parallel-size"):
        ParallelConfig(vae_parallel_mode="tile")
    assert ParallelConfig(vae_patch_parallel_size=2, **TILES).description().endswith("VAE tiles over 2 ranks")


def test_what_has_no_tiles_is_refused_in_tiles_only() -> None:
    pipe = zoo.build("flux")
    pipe.vae.__class__ = type("Untiled", (type(pipe.vae),), {"tiled_decode": _own_loop})
    check_splits(pipe, ParallelConfig(vae_patch_parallel_size=2))
    with pytest.raises(ConfigError, match="Untiled, whose tiled_decode is not diffusers' own"):
        check_splits(pipe, ParallelConfig(vae_patch_parallel_size=2, **TILES))


def _own_loop(*_: Any, **__: Any) -> None:
    return None

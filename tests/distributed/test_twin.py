"""What the twin foresees, against what the VAE does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from penstock.distributed.twin import TileCall, TilePlan, Twin, gated, split_output
from penstock.errors import ConfigError
from tests.distributed.tiled_vaes import CASES, decode, draw, encode
from tests.zoo import autoencoders

ENCODING = [name for name, case in CASES.items() if case.picture is not None]


def outermost(vae: Any, half: str) -> str:
    """The tiled method that a whole decode or encode enters first."""
    verb = "decode" if half == "decoder" else "encode"
    if hasattr(vae, f"_{verb}_clip"):
        return f"_{verb}_clip"
    if getattr(vae, f"use_framewise_{half[:-2]}ing", False) and hasattr(vae, f"_temporal_tiled_{verb}"):
        return f"_temporal_tiled_{verb}"
    return f"_tiled_{verb}" if hasattr(vae, f"_tiled_{verb}") else f"tiled_{verb}"


def check_plan(name: str, half: str) -> None:
    case = CASES[name]
    vae = case.tiled()
    method = outermost(vae, half)
    stock, entries, found = getattr(vae, method), [], []

    def entering(*args: Any, **kwargs: Any) -> Any:
        entries.append((args, kwargs))
        return stock(*args, **kwargs)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        sample, states = split_output(output)
        num_outputs = 1 + len(states) if isinstance(output, tuple) else 0
        found.append((tuple(sample.shape), sample.dtype, num_outputs))

    vars(vae)[method] = entering
    getattr(vae, half).register_forward_hook(note)
    _ = decode(vae, draw(case.latents)) if half == "decoder" else encode(vae, draw(case.picture or ()))
    del vars(vae)[method]
    twin = Twin(vae)
    plans = [twin.plan(method, args, kwargs) for args, kwargs in entries]
    calls = [call for plan in plans for call in plan.calls]
    assert [(call.shape, call.dtype, call.num_outputs) for call in calls] == found
    for plan in plans:
        per_tile = case.calls_per_tile[half == "encoder"]
        assert [call.tile for call in plan.calls] == [tile for tile in range(len(plan.costs)) for _ in range(per_tile)]
        assert len(plan.costs) >= 4


@pytest.mark.parametrize("name", CASES)
def test_decoder_calls_are_foreseen(name: str) -> None:
    check_plan(name, "decoder")


@pytest.mark.parametrize("name", ENCODING)
def test_encoder_calls_are_foreseen(name: str) -> None:
    check_plan(name, "encoder")


def runs_of(twin: Twin) -> list[Any]:
    """Grows with each real call of the twin's decoder."""
    runs: list[Any] = []
    twin._copy.decoder.register_forward_hook(lambda *_: runs.append(None))
    return runs


def test_each_shape_of_tile_runs_once() -> None:
    vae = CASES["kl"].tiled()
    twin = Twin(vae)
    runs = runs_of(twin)
    plan = twin.plan("tiled_decode", (draw(CASES["kl"].latents),), {})
    assert len(plan.calls) == 12
    assert len(runs) == 6
    assert twin.plan("tiled_decode", (draw(CASES["kl"].latents) + 1,), {}) is plan
    assert len(runs) == 6


def test_frames_that_change_no_state_run_once() -> None:
    twin = Twin(CASES["wan"].tiled())
    runs = runs_of(twin)
    plan = twin.plan("tiled_decode", (draw((1, 4, 21, 5, 8)),), {})
    assert len(plan.calls) == 6 * 21
    assert {call.shape[2] for call in plan.calls} == {1, 4}
    assert len(runs) <= 4 * 4  # shapes of tiles, and frames until the caches are full


def test_a_plan_follows_sizes_and_dtypes() -> None:
    vae = CASES["kl"].tiled()
    twin = Twin(vae)
    latents = draw(CASES["kl"].latents)
    assert len(twin.plan("tiled_decode", (latents,), {}).costs) == 12
    vae.tile_latent_min_size = 16
    assert len(twin.plan("tiled_decode", (latents,), {}).costs) == 4
    vae.to(torch.bfloat16)
    plan = twin.plan("tiled_decode", (latents.bfloat16(),), {})
    assert {call.dtype for call in plan.calls} == {torch.bfloat16}


def test_a_twin_holds_no_memory() -> None:
    vae = CASES["vidtok"].tiled()
    twin = Twin(vae)
    assert {tensor.device.type for tensor in (*twin._copy.parameters(), *twin._copy.buffers())} == {"meta"}


def test_tiles_are_shared_by_size() -> None:
    plan = TilePlan((), (9, 9, 3, 9, 9, 3, 6, 6, 2))
    for size in (1, 2, 3, 4):
        owners = plan.owners(size)
        loads = [sum(cost for cost, owner in zip(plan.costs, owners, strict=True) if owner == r) for r in range(size)]
        assert sum(loads) == 56
        assert max(loads) - min(loads) <= 9
    assert TilePlan((), (4, 4, 4, 4)).owners(4) == (0, 1, 2, 3)
    assert TilePlan((), (4, 4)).owners(4) == (0, 1)


def test_an_output_keeps_its_form() -> None:
    sample = torch.zeros(1)
    assert TileCall(0, (1,), torch.float32, 0).output(sample) is sample
    assert TileCall(0, (1,), torch.float32, 2).output(sample) == (sample, None)
    assert TileCall(0, (1,), torch.float32, 2).output(sample, ("state",)) == (sample, "state")
    assert split_output((sample, "state")) == (sample, ("state",))
    assert split_output(sample) == (sample, ())


def test_a_gate_is_the_half_but_for_its_calls() -> None:
    vae = autoencoders.kl()
    decoder, before = vae.decoder, dict(vars(vae))
    with gated(vae, lambda half, args, kwargs: (half, args, kwargs), is_blended=False):
        assert vae.decoder(1, two=3) == (decoder, (1,), {"two": 3})
        assert vae.decoder.conv_out is decoder.conv_out
        assert "decoder" in dict(vae.named_children())
        assert vae.blend_v("above", "tile", 4) == "tile"
    assert vars(vae) == before
    assert vae.decoder is decoder


def test_a_vae_that_no_config_describes_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sequential cannot be foreseen.*no from_config.*at 1"):
        Twin(nn.Sequential())

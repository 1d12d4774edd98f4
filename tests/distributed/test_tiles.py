"""Tiles over ranks: every class that diffusers tiles, against its own tiled result on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import penstock
from penstock.distributed.group import Group
from penstock.distributed.tiles import apply_tiles, check_tiles
from penstock.distributed.twin import split_output
from penstock.errors import ConfigError, GenerationError
from tests import zoo
from tests.distributed.tiled_vaes import CASES, decode, draw, encode
from tests.ranks import run_ranks
from tests.turns import by_turns
from tests.zoo import autoencoders

ENCODING = [name for name, case in CASES.items() if case.picture is not None]
NAMED = ("kl", "flux2", "qwen_image", "wan", "hunyuan_video15", "ltx2")
"""VAEs of the families most used: those that four ranks are tried with."""
WITH_SMALL = [name for name, case in CASES.items() if case.small is not None]


@dataclass
class Count:
    """Calls of an encoder or decoder that were really made, elements that went in, and bytes that came out."""

    num_calls: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    largest: int = 0


@contextmanager
def counted(half: nn.Module) -> Iterator[Count]:
    count = Count()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        (given,) = [*args, *kwargs.values()][:1]
        count.num_calls += 1
        count.num_elements += given.numel()
        count.largest = max(count.largest, given.numel())
        count.num_bytes += split_output(output)[0].nbytes

    handle = half.register_forward_hook(note, with_kwargs=True)
    yield count
    handle.remove()


class Deaf(Group):
    """Hears nothing of other ranks."""

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor if source == self.rank else tensor.zero_()


def group_of_all(kind: type[Group] = Group) -> Group:
    world_size = dist.get_world_size()
    return kind("vae", dist.get_rank(), tuple(range(world_size)), dist.group.WORLD)


def attributes(vae: nn.Module) -> dict[str, Any]:
    """What an instance holds, but for the tensors that a run leaves behind."""
    return {name: value for name, value in vars(vae).items() if "feat" not in name and "conv_idx" not in name}


def run_half(vae: Any, name: str, half: str) -> Tensor:
    case = CASES[name]
    return decode(vae, draw(case.latents)) if half == "decoder" else encode(vae, draw(case.picture or ()))


def spread(name: str, half: str) -> tuple[bool, Count, Count, int, int]:
    """On each rank: is the result that of one rank, what one rank computes, what this one does, and its traffic."""
    vae = CASES[name].tiled()
    with counted(getattr(vae, half)) as alone:
        expected = run_half(vae, name, half)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.05
    before = attributes(vae)
    group = group_of_all()
    undo = apply_tiles(vae, group)
    with counted(getattr(vae, half)) as shared:
        result = run_half(vae, name, half)
    undo.run()
    assert attributes(vae) == before
    return (
        torch.equal(result, expected),
        alone,
        shared,
        group.traffic.received_bytes["broadcast"],
        group.traffic.received_bytes.total(),
    )


def check_spread(name: str, half: str, world_size: int) -> None:
    ranks = run_ranks(world_size, spread, name, half)
    assert [same for same, *_ in ranks] == [True] * world_size
    alone = ranks[0][1]
    largest_tile = alone.largest * CASES[name].calls_per_tile[half == "encoder"]
    assert sum(shared.num_calls for _, _, shared, _, _ in ranks) == alone.num_calls
    for _, _, shared, broadcast_bytes, all_bytes in ranks:
        assert 0 < shared.num_elements <= alone.num_elements / world_size + largest_tile
        assert broadcast_bytes == all_bytes == alone.num_bytes - shared.num_bytes
    assert sum(rank[3] for rank in ranks) == (world_size - 1) * alone.num_bytes


@pytest.mark.parametrize(("name", "world_size"), [*((name, 2) for name in CASES), *((name, 4) for name in NAMED)])
def test_decoding_in_tiles_is_that_of_one_rank(name: str, world_size: int) -> None:
    check_spread(name, "decoder", world_size)


@pytest.mark.parametrize("name", ENCODING)
def test_encoding_in_tiles_is_that_of_one_rank(name: str) -> None:
    check_spread(name, "encoder", 2)


def every_case(function: Any, names: list[str]) -> dict[str, bool]:
    return {name: function(name) for name in names}


def is_right_without_exchange(name: str) -> bool:
    vae = CASES[name].tiled()
    expected = run_half(vae, name, "decoder")
    apply_tiles(vae, group_of_all(Deaf))
    return torch.equal(run_half(vae, name, "decoder"), expected)


def test_without_the_exchange_every_result_is_wrong() -> None:
    names = by_turns(CASES, 4)
    for right in run_ranks(2, every_case, is_right_without_exchange, names):
        assert set(right) == set(names)
        assert not any(right.values())


def is_small_picture_untouched(name: str) -> bool:
    vae = CASES[name].build()
    latents = draw(CASES[name].small or ())
    expected = decode(vae, latents)
    group = group_of_all()
    vae.enable_tiling(**CASES[name].tiling)
    apply_tiles(vae, group)
    return torch.equal(decode(vae, latents), expected) and not group.traffic.num_calls


def test_pictures_of_one_tile_are_decoded_as_ever() -> None:
    for untouched in run_ranks(2, every_case, is_small_picture_untouched, WITH_SMALL):
        assert all(untouched.values())


def switches_around() -> tuple[bool, bool, bool]:
    vae = autoencoders.wan()
    before = dict(vars(vae))
    undo = apply_tiles(vae, group_of_all())
    during = vae.use_tiling
    undo.run()
    undo.run()
    return before["use_tiling"], during, vars(vae) == before


def test_tiling_is_switched_on_and_off_again() -> None:
    assert run_ranks(2, switches_around) == [(False, True, True)] * 2


def test_a_method_that_somebody_else_put_there_survives() -> None:
    vae = autoencoders.kl()
    mine = vae.tiled_decode
    vae.tiled_decode = mine
    undo = apply_tiles(vae, Group("vae", 0, (0, 1), None))
    assert vae.tiled_decode is not mine
    undo.run()
    assert vars(vae)["tiled_decode"] is mine


def test_one_rank_changes_nothing() -> None:
    vae = autoencoders.kl()
    before = dict(vars(vae))
    apply_tiles(vae, Group("vae", 0, (0,), None)).run()
    apply_tiles(vae, Group("vae", 0, (0,), None))
    assert vars(vae) == before


def stray() -> str:
    vae = CASES["kl"].tiled()
    apply_tiles(vae, group_of_all())
    vae.decoder.conv_out = nn.Conv2d(vae.decoder.conv_out.in_channels, 5, 3, padding=1)
    with pytest.raises(GenerationError) as caught:
        run_half(vae, "kl", "decoder")
    return str(caught.value)


def test_a_decoder_unlike_its_config_is_told() -> None:
    for message in run_ranks(2, stray):
        assert "(1, 5, 32, 32)" in message
        assert "(1, 3, 32, 32)" in message
        assert "vae_patch_parallel_size at 1" in message


class Broken(nn.Module):
    """An encoder or decoder that fails."""

    def forward(self, sample: Tensor) -> Tensor:
        raise ValueError("a tile is bad")


def fail() -> bool:
    vae = CASES["kl"].tiled()
    apply_tiles(vae, group_of_all())
    latents, decoder = draw(CASES["kl"].latents), vae.decoder
    vae.decoder = Broken()
    with pytest.raises(ValueError, match="a tile is bad"):
        decode(vae, latents)
    vae.decoder = decoder
    return torch.equal(decode(vae, latents), decode(CASES["kl"].tiled(), latents))


def test_after_a_tile_failed_the_next_picture_is_right() -> None:
    assert run_ranks(2, fail) == [True, True]


def cast() -> bool:
    vae = CASES["kl"].tiled()
    apply_tiles(vae, group_of_all())
    same = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        vae.to(dtype)
        latents = draw(CASES["kl"].latents).to(dtype)
        expected = decode(CASES["kl"].tiled().to(torch.bfloat16 if same else dtype).to(dtype), latents)
        same.append(torch.equal(decode(vae, latents), expected))
    return all(same)


def test_a_pipeline_may_cast_its_vae_between_pictures() -> None:
    assert run_ranks(2, cast) == [True, True]


TILE_SIZES = {
    "flux": {"tile_sample_min_size": 16, "tile_latent_min_size": 4},
    "wan21": {"tile_sample_min_height": 16, "tile_sample_min_width": 16}
    | {"tile_sample_stride_height": 8, "tile_sample_stride_width": 8},
}


def stream(name: str) -> tuple[bool, int, int, bool]:
    pipe = zoo.build(name)
    vars(pipe.vae).update(TILE_SIZES[name], use_tiling=True)
    with counted(pipe.vae.decoder) as alone:
        expected = zoo.tensors(zoo.run(pipe, name))
    parallel = penstock.ParallelConfig(vae_patch_parallel_size=dist.get_world_size())
    with penstock.apply(pipe, offload="layerwise", max_weight_memory="least", parallel=parallel) as placed:
        with counted(pipe.vae.decoder) as shared:
            results = zoo.tensors(zoo.run(pipe, name))
        report = placed.report()
    same = all(torch.equal(result, value) for result, value in zip(results, expected, strict=True))
    return same, alone.num_calls, shared.num_calls, report.peak_bytes <= report.plan.promised_bytes


@pytest.mark.parametrize("name", TILE_SIZES)
def test_weights_may_be_streamed(name: str) -> None:
    world_size = 2
    ranks = run_ranks(world_size, stream, name)
    assert all(same and within for same, _, _, within in ranks)
    calls = ranks[0][1]
    assert calls > world_size
    assert sum(shared for _, _, shared, _ in ranks) == calls
    assert all(shared > 0 for _, _, shared, _ in ranks)


@pytest.mark.parametrize(
    ("vae", "reason"),
    [
        (diffusers.AsymmetricAutoencoderKL, "in one piece"),
        (diffusers.AutoencoderKLTemporalDecoder, "in one piece"),
        (diffusers.VQModel, "in one piece"),
        (nn.Identity, "in one piece"),
        (diffusers.LTX2VideoDiffusionDecoderModel, "noise of their own"),
    ],
)
def test_a_vae_without_tiles_is_refused(vae: Any, reason: str) -> None:
    with torch.device("meta"):
        module = vae()
    before = dict(vars(module))
    with pytest.raises(ConfigError, match=f"{vae.__name__}.*{reason}.*vae_patch_parallel_size at 1"):
        apply_tiles(module, Group("vae", 0, (0, 1), None))
    assert vars(module) == before


class OwnLoop(diffusers.AutoencoderKL):
    """Decodes in tiles of its own."""

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        return super().tiled_decode(z, return_dict)


def test_a_loop_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"OwnLoop, whose tiled_decode is not diffusers' own"):
        check_tiles(OwnLoop())


def test_tiles_that_draw_noise_are_refused() -> None:
    with torch.device("meta"):
        noisy = diffusers.AutoencoderKLLTXVideo(decoder_inject_noise=(True, True, True, False, False))
    with pytest.raises(ConfigError, match="AutoencoderKLLTXVideo with decoder_inject_noise"):
        check_tiles(noisy)


class Unbuilt(diffusers.AutoencoderKL):
    """Not to be built again from its config."""

    def __init__(self, channels: int = 8) -> None:
        if torch.get_default_device().type == "meta":
            raise RuntimeError("no weights here")
        super().__init__(block_out_channels=(channels,), norm_num_groups=4)


def test_a_vae_that_has_no_twin_is_refused_beforehand() -> None:
    vae = Unbuilt()
    before = dict(vars(vae))
    with pytest.raises(ConfigError, match=r"Unbuilt cannot be foreseen.*no weights here.*vae_patch_parallel_size at 1"):
        check_tiles(vae)
    with pytest.raises(ConfigError, match="Unbuilt cannot be foreseen"):
        apply_tiles(vae, Group("vae", 0, (0, 1), None))
    assert vars(vae) == before


@pytest.mark.parametrize("method", ["enable_tiling", "tiled_encode"])
def test_what_fails_half_way_leaves_nothing_behind(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = autoencoders.kl()
    before = dict(vars(vae))
    if method == "enable_tiling":

        def enable_tiling(self: Any) -> None:
            self.use_tiling = True
            raise KeyboardInterrupt

        monkeypatch.setattr(type(vae), method, enable_tiling)
    else:
        monkeypatch.setattr("penstock.undo.wraps", lambda stock: interrupted_by(stock.__name__))
    with pytest.raises(KeyboardInterrupt):
        apply_tiles(vae, Group("vae", 0, (0, 1), None))
    assert vars(vae) == before


def interrupted_by(name: str) -> Callable[[Any], Any]:
    """Wraps what comes before the tiled encode."""

    def wrapped(method: Any) -> Any:
        if name == "tiled_encode":
            raise KeyboardInterrupt
        return method

    return wrapped


@pytest.mark.parametrize("name", CASES)
def test_a_vae_with_tiles_passes(name: str) -> None:
    check_tiles(CASES[name].build())

"""VAEs by rows: every class that diffusers has, against its own untiled result on one rank."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock.distributed.group import Group
from penstock.distributed.patch.autoencoder import apply_patches, check_patches
from penstock.distributed.patch.strip import Strip
from penstock.distributed.tiles import apply_tiles
from penstock.errors import ConfigError
from tests.distributed.patch.pieces import Deaf, group_of_all
from tests.distributed.tiled_vaes import CASES, decode, draw, encode, is_plain
from tests.ranks import run_ranks
from tests.turns import by_turns
from tests.zoo import autoencoders

UNTILED = [name for name in CASES if name != "allegro"]
"""Allegro has no untiled decode."""
WHOLE = {"minimax": {"cat", "slice"}}
"""Operations that run whole, by class: MiniMax's decoder is a transformer whose tokens are joined with others."""
NAMED = ("kl", "qwen_image", "wan", "deep_compression")
TOLERANCE = 1e-5


def apart(result: Tensor, expected: Tensor) -> float:
    assert type(result) is Tensor and result.shape == expected.shape
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max())


def halves(name: str) -> dict[str, tuple[Any, Tensor]]:
    case = CASES[name]
    found = {"decode": (decode, draw(case.latents))}
    if case.picture is not None:
        found["encode"] = (encode, draw(case.picture))
    return found


def spread(names: list[str]) -> dict[str, tuple[bool, set[str], int]]:
    """By class and call: whether it is one rank's result, what ran whole, bytes received."""
    found = {}
    for name in names:
        vae = CASES[name].build()
        expected = {call: run(vae, given) for call, (run, given) in halves(name).items()}
        notes: list[str] = []
        before = dict(vars(vae))
        group = group_of_all()
        undo = apply_patches(vae, group, notes.append)
        far, received = {}, {}
        for call, (run, given) in halves(name).items():
            group.traffic.clear()
            far[call] = apart(run(vae, given), expected[call])
            received[call] = group.traffic.received_bytes.total()
        undo.run()
        whole = {note.split(": ")[1].split(" ran ")[0] for note in notes}
        for call, (run, given) in halves(name).items():
            found[f"{name} {call}"] = (is_plain(far[call], vae, partial(run, vae, given)), whole, received[call])
        assert {key: value for key, value in vars(vae).items() if "feat" not in key and "conv_idx" not in key} == {
            key: value for key, value in before.items() if "feat" not in key and "conv_idx" not in key
        }
    return found


@pytest.mark.parametrize(
    ("names", "num_ranks"),
    [
        pytest.param(UNTILED, 2, marks=pytest.mark.thorough, id="all"),
        pytest.param(by_turns(UNTILED, 6), 2, id="by turns"),
        pytest.param(NAMED, 4, marks=pytest.mark.thorough, id="four ranks"),
    ],
)
def test_encode_and_decode_are_those_of_one_rank(names: list[str], num_ranks: int) -> None:
    for found in run_ranks(num_ranks, spread, list(names)):
        assert [name for name, (is_right, _, _) in found.items() if not is_right] == []
        for name, (_, whole, received) in found.items():
            assert whole <= WHOLE.get(name.split()[0], set()), name
            assert received > 0


def without_exchange(names: list[str]) -> dict[str, bool]:
    found = {}
    for name in names:
        vae = CASES[name].build()
        run, given = halves(name)["decode"]
        expected = run(vae, given)
        apply_patches(vae, group_of_all(Deaf), str)
        found[name] = apart(run(vae, given), expected) > 0.01
    return found


def test_without_the_exchange_every_result_is_wrong() -> None:
    for found in run_ranks(2, without_exchange, by_turns(UNTILED, 8)):
        assert all(found.values()), found


class Walker(TorchDispatchMode):
    """Notes the most bytes of tensors that lived at once, temporary ones of strips included."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Strip) for leaf in tree_leaves((args, kwargs))):
            with self:
                return Strip.__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        self._live += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._live = [ref for ref in self._live if ref() is not None]
        storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in map(_of, self._live)}
        self.most = max(self.most, sum(storages.values()))
        return result


def _of(reference: weakref.ref[Tensor]) -> Tensor:
    tensor = reference()
    assert tensor is not None
    return tensor


def peaks() -> tuple[int, int, int]:
    """Most bytes of activations on one rank and by rows, and the bytes of the whole picture."""
    vae, latents = autoencoders.kl(), draw((1, 4, 32, 32))
    with Walker() as alone:
        picture = decode(vae, latents)
    apply_patches(vae, group_of_all())
    with Walker() as shared:
        decode(vae, latents)
    return alone.most, shared.most, picture.nbytes


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_activations_are_divided(num_ranks: int) -> None:
    for alone, shared, picture in run_ranks(num_ranks, peaks):
        assert shared <= 1.25 * alone / num_ranks + 2 * picture


def counted() -> tuple[dict[str, int], int, int, int]:
    vae = autoencoders.kl().requires_grad_(False)
    latents, group = draw((1, 4, 32, 32)), group_of_all()
    apply_patches(vae, group)
    picture = decode(vae, latents)
    wide = [layer for layer in vae.decoder.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1]
    norms = [layer for layer in vae.decoder.modules() if isinstance(layer, nn.GroupNorm)]
    return (
        dict(group.traffic.num_calls),
        len(wide),
        len(norms),
        group.traffic.received_bytes["trade"] - picture.nbytes // 2,
    )


def test_what_is_exchanged_is_borders_statistics_keys_values_and_the_picture() -> None:
    for calls, num_wide, num_norms, rest in run_ranks(2, counted):
        keys_and_values = 2
        assert calls == {"trade": num_wide + keys_and_values + 1, "all_gather": num_norms}
        assert 0 < rest < 160_000  # rows of 8 to 16 channels and up to 128 columns, and 2 * 16 * 512 floats


def variations() -> dict[str, float]:
    """How far from one rank's, in all ways to call a VAE."""
    vae, group = autoencoders.kl().requires_grad_(False), group_of_all()
    latents = draw((3, 4, 15, 19))
    found: dict[str, float] = {}

    def compare(name: str, call: Any) -> None:
        undo = apply_patches(vae, group)
        result = call()
        undo.run()
        found[name] = apart(result, call())

    compare("batch", lambda: decode(vae, latents))
    compare("tuple", lambda: vae.decode(latents, return_dict=False)[0])
    compare("by name", lambda: vae.decode(z=latents).sample)
    compare("through forward", lambda: vae(draw((1, 3, 60, 76))).sample)
    compare("std", lambda: vae.encode(draw((1, 3, 60, 76))).latent_dist.std)
    generators = iter([torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)])
    compare("sample", lambda: vae.encode(draw((1, 3, 60, 76))).latent_dist.sample(next(generators)))
    compare("odd picture", lambda: encode(vae, draw((1, 3, 52, 44))))
    compare("narrow", lambda: decode(vae, draw((1, 4, 2, 5))))
    vae.enable_slicing()
    compare("slices", lambda: decode(vae, latents))
    vae.disable_slicing()
    vae.to(memory_format=torch.channels_last)
    compare("channels last", lambda: decode(vae, latents))
    with torch.inference_mode():
        compare("inference mode", lambda: vae.decode(latents).sample)
    return found


def test_all_ways_to_call_it_are_right() -> None:
    for found in run_ranks(2, variations):
        assert {name: far for name, far in found.items() if not far < TOLERANCE} == {}
        assert len(found) == 11


def short() -> tuple[float, float]:
    """In bfloat16: how far one rank is from float32, and rows from one rank."""
    vae, latents = autoencoders.kl().requires_grad_(False), draw((1, 4, 15, 19))
    exact = decode(vae, latents)
    vae.to(torch.bfloat16)
    expected = decode(vae, latents.bfloat16())
    apply_patches(vae, group_of_all())
    return apart(expected, exact), apart(decode(vae, latents.bfloat16()), expected)


def test_in_bfloat16_rows_are_no_further_off_than_one_rank() -> None:
    for control, far in run_ranks(2, short):
        assert far <= 1.5 * control and control > 0


def few_rows() -> tuple[bool, int, list[str]]:
    vae, latents, group = autoencoders.kl().requires_grad_(False), draw((1, 4, 2, 3)), group_of_all()
    expected, notes = decode(vae, latents), list[str]()
    apply_patches(vae, group, notes.append)
    return torch.equal(decode(vae, latents), expected), group.traffic.num_calls.total(), notes


def test_fewer_rows_than_ranks_run_whole() -> None:
    for is_same, num_calls, (note,) in run_ranks(4, few_rows):
        assert is_same and not num_calls
        assert "AutoencoderKL.decode ran whole on each of 4 ranks: a tensor of shape (1, 4, 2, 3) has fewer" in note


def gradients() -> tuple[bool, int]:
    vae, latents, group = autoencoders.kl(), draw((1, 4, 8, 8)).requires_grad_(), group_of_all()
    (expected,) = torch.autograd.grad(vae.decode(latents).sample.sum(), latents)
    apply_patches(vae, group, str)
    (result,) = torch.autograd.grad(vae.decode(latents).sample.sum(), latents)
    return torch.equal(result, expected), group.traffic.num_calls.total()


def test_gradients_pass_as_on_one_rank() -> None:
    assert run_ranks(2, gradients) == [(True, 0)] * 2


def compiled(what: str) -> tuple[bool, int, str]:
    vae, latents, group = autoencoders.kl().requires_grad_(False), draw((1, 4, 8, 8)), group_of_all()
    expected, notes = decode(vae, latents), list[str]()
    if what == "a module":
        vae.decoder.compile(backend="eager")
    else:
        vae.decode = torch.compile(vae.decode, backend="eager")
    apply_patches(vae, group, notes.append)
    return apart(decode(vae, latents), expected) < TOLERANCE, group.traffic.num_calls.total(), notes[0]


@pytest.mark.parametrize("what", ["a module", pytest.param("the call", marks=pytest.mark.thorough)])
def test_a_compiled_vae_runs_whole(what: str) -> None:
    for is_right, num_calls, note in run_ranks(2, compiled, what):
        assert is_right and not num_calls and "the VAE is compiled" in note


def tiled(is_early: bool) -> tuple[bool, int, bool]:
    """A VAE that is tiled before it is spread, or later; then untiled again."""
    case, group = CASES["kl"], group_of_all()
    latents = draw(case.latents)
    expected, untiled = decode(case.tiled(), latents), decode(case.build(), latents)
    vae = case.tiled() if is_early else case.build()
    apply_tiles(vae, group, is_switched_on=False)
    apply_patches(vae, group)
    vae.enable_tiling()
    is_same = torch.equal(decode(vae, latents), expected)
    num_tiles = group.traffic.num_calls["broadcast"]
    vae.disable_tiling()
    return is_same, num_tiles, apart(decode(vae, latents), untiled) < TOLERANCE


@pytest.mark.parametrize("is_early", [True, False])
def test_a_tiled_vae_keeps_its_tiles(is_early: bool) -> None:
    for is_same, num_tiles, is_untiled in run_ranks(2, tiled, is_early):
        assert is_same and is_untiled and num_tiles > 1


def noisy() -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        vae = diffusers.AutoencoderKLLTXVideo(
            **{**autoencoders.ltx().config, "decoder_inject_noise": (True, True, True)}  # type: ignore[attr-defined]
        ).requires_grad_(False)
        for name, weight in vae.named_parameters():
            if "per_channel_scale" in name:
                weight.fill_(0.3)
        latents = draw((1, 8, 3, 8, 11))
        torch.manual_seed(6)
        expected = decode(vae, latents)
        again = decode(vae, latents)
        apply_patches(vae, group_of_all(), str)
        torch.manual_seed(6)
        result = decode(vae, latents)
    assert apart(again, expected) > 0.01  # the noise is seen
    return apart(result, expected)


def test_noise_inside_a_decoder_is_that_of_one_rank() -> None:
    assert max(run_ranks(2, noisy)) < TOLERANCE


class Unheard(nn.Module):
    """A VAE of nobody's, with operations that rows do not go through."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

    def decode(self, z: Tensor) -> Tensor:
        """Convolve, mix rows, convolve."""
        x = self.conv(z)
        x = x + torch.cumsum(x, 2) / 10 + torch.fft.rfft(x, dim=2).abs().mean()
        return self.conv(x[:, :, torch.arange(x.shape[2] - 1, -1, -1)])


def unheard() -> tuple[float, list[str]]:
    vae, notes, latents = Unheard(), list[str](), draw((1, 4, 12, 7))
    expected = vae.decode(latents)
    apply_patches(vae, group_of_all(), notes.append)
    first = apart(vae.decode(latents), expected)
    return max(first, apart(vae.decode(latents), expected)), notes


def test_what_no_row_goes_through_runs_whole_and_is_told_once() -> None:
    for far, notes in run_ranks(3, unheard):
        assert far < TOLERANCE
        assert len(notes) == len(set(notes))
        assert any(note.startswith("Unheard.decode: cumsum ran whole on each of 3 ranks") for note in notes)


def test_what_has_neither_encode_nor_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Identity, which has neither encode nor decode.*parallel_size at 1"):
        check_patches(nn.Identity())
    check_patches(autoencoders.kl())


def test_one_rank_changes_nothing() -> None:
    vae = autoencoders.kl()
    before = dict(vars(vae))
    apply_patches(vae, Group("vae", 0, (0,), None))
    assert vars(vae) == before
    undo = apply_patches(vae, Group("vae", 0, (0, 1), None))
    assert vars(vae) != before
    undo.run()
    assert vars(vae) == before


def fail_inside() -> float:
    vae, latents = autoencoders.kl().requires_grad_(False), draw((1, 4, 15, 19))
    expected = decode(vae, latents)
    apply_patches(vae, group_of_all())
    handle = vae.decoder.conv_out.register_forward_pre_hook(_fail)
    with pytest.raises(ValueError, match="a layer is bad"):
        decode(vae, latents)
    handle.remove()
    dist.barrier()
    return apart(decode(vae, latents), expected)


def _fail(*_: Any) -> None:
    raise ValueError("a layer is bad")


def test_after_a_call_failed_the_next_is_right() -> None:
    assert max(run_ranks(2, fail_inside)) < TOLERANCE

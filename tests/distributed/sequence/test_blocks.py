"""Every class that has a row, split over ranks, is the same as on one; what cannot be split says why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.models.attention_processor import AttnProcessor, FluxIPAdapterJointAttnProcessor2_0
from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed.sequence.blocks import apply_sequence, check_sequence
from penstock.errors import ConfigError, DeclarationError, GenerationError
from penstock.models.rows.refused import REFUSED
from penstock.models.rows.row import Row, StackRow
from penstock.models.rows.table import ROWS, row_of
from penstock.undo import Undo
from tests.distributed import sequences
from tests.distributed.sequences import (
    CASES,
    ByKeyword,
    compare,
    difference,
    error_of,
    mesh_of,
    run,
    traffic,
)
from tests.ranks import run_ranks
from tests.tolerance import tolerance_of
from tests.zoo.denoisers import grid, image, kin, video
from tests.zoo.denoisers.case import noise

NAMES = [name for name, case in CASES.items() if row_of(case.build()) is not None]
MAIN = ("flux", "flux2", "sd3", "qwen_image", "z_image", "lumina2", "wan", "hunyuan_video15", "ltx2", "cogvideox")
FAMILIES = [case.name for kind in (image, video, kin, grid) for case in kind.CASES if case.name in NAMES]
BATCH, WIDTH = 2, 64  # of the cases with four heads


def check(world_size: int, name: str, *arguments: Any) -> None:
    """Asserts that the split denoiser is the plain one, and that attention has a part in that."""
    for measured in run_ranks(world_size, compare, name, *arguments):
        for where, (split, local, allowed) in measured.items():
            assert split < allowed, where
            assert local > 10 * allowed, where


def odd_sizes(name: str) -> tuple[str, ...]:
    """The sizes of a case that do not divide, or the first one."""
    variants = CASES[name].variants
    return tuple(size for size in variants if "odd" in size) or variants[:1]


def test_every_row_is_proven() -> None:
    assert {type(CASES[name].build()).__name__ for name in NAMES} == set(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_the_split_denoiser_is_the_plain_one(name: str) -> None:
    check(4, name, ((2, 2),), CASES[name].variants)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_split_denoiser_is_the_plain_one_on_eight_ranks(name: str) -> None:
    check(8, name, ((4, 2),), odd_sizes(name))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MAIN)
def test_ulysses_or_ring_alone(name: str, ranks: int) -> None:
    check(ranks, name, ((ranks, 1), (1, ranks)), CASES[name].variants if ranks == 2 else odd_sizes(name))


def test_more_ranks_than_heads() -> None:
    check(8, "flux", ((8, 1), (2, 4)), ("odd",))


@pytest.mark.parametrize("name", ["flux", "wan", "lumina2", "ltx2"])
def test_heads_that_do_not_divide(name: str) -> None:
    check(4, name, ((4, 1), (2, 2)), odd_sizes(name), 3)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_bfloat16(name: str) -> None:
    for measured in run_ranks(4, compare, name, ((4, 1), (2, 2)), ("odd",), 4, torch.bfloat16):
        for split, local, allowed in measured.values():
            assert split < allowed < local


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "hunyuan_video"])
def test_text_that_is_whole_on_every_rank(name: str) -> None:
    check(4, name, ((4, 1), (1, 4), (2, 2)), odd_sizes(name), 4, torch.float32, sequences.whole_text)


@pytest.mark.parametrize("name", ["ltx2", "ltx23", "kandinsky6"])
def test_sound_that_is_cut_as_well(name: str) -> None:
    check(4, name, ((4, 1), (1, 4), (2, 2)), odd_sizes(name), 4, torch.float32, sequences.nothing_whole)


def test_streams_that_are_gathered_after_every_block() -> None:
    check(4, "flux", ((2, 2),), ("odd",), 4, torch.float32, sequences.apart)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flux", sequences.both_residuals),
        ("bria", sequences.residuals),
        ("chroma", sequences.both_residuals),
        ("qwen_image", sequences.residuals),
        ("sd3", sequences.block_residuals),
        ("z_image", sequences.layer_residuals),
    ],
)
def test_residuals_of_a_controlnet(name: str, more: Any) -> None:
    check(4, name, ((2, 2),), ("odd",), 4, torch.float32, sequences.same, more)


@pytest.mark.parametrize(("name", "more"), [("pixart", sequences.pixel_mask), ("allegro", sequences.voxel_mask)])
def test_masks_of_the_picture_which_are_prepared_for_each_head(name: str, more: Any) -> None:
    check(4, name, ((4, 1), (1, 4), (2, 2)), ("odd",), 4, torch.float32, sequences.same, more)
    check(4, name, ((4, 1), (2, 2)), ("odd",), 3, torch.float32, sequences.same, more)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize(("name", "calls", "text", "gathered"), [("wan", 3, 0, 1), ("flux", 5, 8, 1)])
def test_ranks_exchange_what_the_formulas_say(
    name: str, calls: int, text: int, gathered: int, ulysses: int, ring: int
) -> None:
    ranks, tokens = ulysses * ring, 64
    activations = BATCH * (tokens + text) * WIDTH * 4  # bytes of all tokens
    for measured in run_ranks(ranks, traffic, name, (ulysses, ring)):
        expected = {"sequence all_gather": (gathered, (ranks - 1) * BATCH * tokens * WIDTH * 4 // ranks)}
        if ulysses > 1:
            received = calls * 4 * (ulysses - 1) * activations // ulysses**2 // ring
            expected["ulysses all_to_all"] = (2 * calls, received)
        if ring > 1:
            expected["ring shift"] = ((ring - 1) * calls, calls * 2 * (ring - 1) * activations // ring // ulysses)
        assert measured == expected


def test_what_is_whole_is_not_sent() -> None:
    blocks = 3  # each: the video looks at itself, and sound, which is whole, at the video
    for measured in run_ranks(2, traffic, "ltx2", (2, 1)):
        assert measured["ulysses all_to_all"][0] == blocks * (2 + 1)
        assert measured["ulysses all_gather"][0] == blocks
        assert measured["sequence all_gather"][0] == 1


def test_a_row_that_does_not_know_what_a_mask_means_refuses_it() -> None:
    for said in run_ranks(2, error_of, "chroma", (2, 1), {}, sequences.without_masks, "masked_odd"):
        assert "ChromaTransformer2DModel" in said
        assert "says for each query of this rank which keys it sees" in said
        assert "ulysses_degree=1" in said


def test_tokens_of_an_adapter_are_refused() -> None:
    for said in run_ranks(2, call_with_adapter):
        assert "FluxTransformer2DModel" in said
        assert "as adapters and caches do" in said


def call_with_adapter() -> str:
    """What Flux says to the tokens of an IP-Adapter."""
    model = CASES["flux"].build()
    adapter = FluxIPAdapterJointAttnProcessor2_0(hidden_size=WIDTH, cross_attention_dim=WIDTH)
    processors = {
        name: adapter if name.startswith("transformer_blocks") else kept for name, kept in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    more = {"joint_attention_kwargs": {"ip_hidden_states": [noise("picture", BATCH, 4, WIDTH)]}}
    apply_sequence(model, check_sequence(model, ParallelConfig()), mesh_of(2, 1))
    try:
        run(model, {**CASES["flux"].inputs("odd"), **more})
    except GenerationError as error:
        return str(error)
    return ""


def old_processors(model: nn.Module) -> None:
    """Attention by hand, which calls no function that can be found."""
    model.set_attn_processor(AttnProcessor())


def another_function(model: nn.Module) -> None:
    """torch's function replaced, after the denoiser was split."""
    F.scaled_dot_product_attention = by_hand


def by_hand(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """Plain attention."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            old_processors,
            "pixart",
            r"transformer_blocks\.\*\.attn1 of PixArtTransformer2DModel .* by AttnProcessor over",
        ),
        (
            another_function,
            "pixart",
            r"transformer_blocks\.\*\.attn1 of PixArtTransformer2DModel .* by AttnProcessor2_0",
        ),
    ],
)
def test_attention_that_does_not_come_to_us_is_an_error(change: Any, name: str, message: str) -> None:
    for said, far in run_ranks(2, call_changed, change, name):
        assert re.match(message, said)
        assert far < 1, "by itself it still works"


def call_changed(change: Any, name: str) -> tuple[str, float]:
    """What a denoiser says that was changed once it was split; and how far it is from itself afterwards, as a share of
    what is allowed."""
    model, inputs = CASES[name].build(), CASES[name].inputs("odd")
    kept, plain = F.scaled_dot_product_attention, run(model, inputs)
    allowed = tolerance_of(model, lambda: run(model, inputs), plain)
    undo = apply_sequence(model, check_sequence(model, ParallelConfig()), mesh_of(2, 1))
    try:
        change(model)
        with pytest.raises(GenerationError) as caught:
            run(model, inputs)
    finally:
        undo.run()
        F.scaled_dot_product_attention = kept
    return str(caught.value), difference(run(model, inputs), plain) / allowed


def test_attention_that_a_cache_skips_is_no_error() -> None:
    for exchanged, far, allowed in run_ranks(2, call_with_cache):
        assert exchanged == [2 * 3, 0]
        assert far < allowed


def call_with_cache() -> tuple[list[int], float, float]:
    """What is exchanged in two steps of which the second one skips attention; how far that is from one rank's; and how
    far it may be."""
    mesh = mesh_of(2, 1)
    inputs = CASES["wan"].inputs("odd")
    cache = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    exchanged, found = [], []
    for is_split in (False, True):
        model = CASES["wan"].build()
        undo = apply_sequence(model, check_sequence(model, ParallelConfig()), mesh) if is_split else Undo()
        model.enable_cache(cache)
        for noisiness in (1, 2):
            mesh["ulysses"].traffic.clear()
            found.append(run(model, {**inputs, "hidden_states": noisiness * inputs["hidden_states"]}))
            exchanged.append(mesh["ulysses"].traffic.num_calls.get("all_to_all", 0))
        undo.run()
    assert exchanged[:2] == [0, 0]
    plain = CASES["wan"].build()
    allowed = tolerance_of(plain, lambda: run(plain, {**inputs, "hidden_states": 2 * inputs["hidden_states"]}))
    return exchanged[2:], max(difference(found[2], found[0]), difference(found[3], found[1])), allowed


def test_modules_that_are_called_by_keyword() -> None:
    for far, allowed in run_ranks(2, call_by_keyword):
        assert far < allowed


def call_by_keyword() -> tuple[float, float]:
    """How far that is from one rank's, and how far it may be."""
    model, tokens = ByKeyword(), {"hidden_states": noise("tokens", 2, 7, 8)}
    plain = run(model, tokens)
    allowed = tolerance_of(list(tokens.values()), lambda: run(model, tokens), plain)
    with apply_sequence(model, check_sequence(model, ParallelConfig()), mesh_of(2, 1)) as undo:
        found = run(model, tokens)
    undo.run()
    return difference(found, plain), allowed


def test_arguments_that_a_row_refuses() -> None:
    for said in run_ranks(2, error_of, "flux2", (2, 1), {"kv_cache_mode": "extract"}):
        assert said.startswith("Flux2Transformer2DModel was called with kv_cache_mode, and its keys and values are")


def test_blocks_that_are_skipped() -> None:
    for said in run_ranks(2, error_of, "sd3", (1, 2), {"skip_layers": [1]}):
        assert said == ""


def test_a_last_block_that_is_skipped() -> None:
    for said in run_ranks(2, call_without_last_block):
        assert said.startswith("the last block of WanTransformer3DModel did not run")


def call_without_last_block() -> str:
    """What Wan says where its last block does not run."""
    model = CASES["wan"].build()
    undo = apply_sequence(model, check_sequence(model, ParallelConfig()), mesh_of(2, 1))
    model.blocks = nn.ModuleList(list(model.blocks)[:-1])
    with a_head_that_doubles(model):
        try:
            run(model, CASES["wan"].inputs("even"))
        except GenerationError as error:
            return str(error)
        finally:
            undo.run()
    return ""


@contextmanager
def a_head_that_doubles(model: nn.Module) -> Iterator[None]:
    """Half of the tokens are taken for all of them, so that nothing else fails first."""
    handle = model.norm_out.register_forward_hook(lambda module, args, output: torch.cat([output, output], 1))
    yield
    handle.remove()


def test_one_rank_changes_nothing() -> None:
    (hooks,) = run_ranks(1, hooks_on_one_rank)
    assert hooks == 0


def hooks_on_one_rank() -> int:
    """How many hooks a denoiser gets where there is nobody to share with."""
    model = CASES["wan"].build()
    apply_sequence(model, check_sequence(model, ParallelConfig()), mesh_of(1, 1)).run()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestCheck:
    """What is found out before weights are needed."""

    config = ParallelConfig(ulysses_degree=2)

    @pytest.mark.parametrize("name", NAMES)
    def test_takes_models_without_storage(self, name: str) -> None:
        model = CASES[name].build().to("meta")
        assert check_sequence(model, self.config) is row_of(model)

    @pytest.mark.parametrize("name", sorted(REFUSED))
    def test_tells_why_a_class_cannot_be_split(self, name: str) -> None:
        kind = getattr(diffusers, name)
        with pytest.raises(ConfigError) as caught:
            check_sequence(kind.__new__(kind), self.config)
        assert str(caught.value).startswith(
            f"the sequence of {name} cannot be split over 2 ranks: {REFUSED[name]}. Use "
        )

    def test_tells_where_to_read_on_for_a_class_without_row(self) -> None:
        with pytest.raises(ConfigError, match=r"Linear cannot be split.*it has no row.*docs/concepts/sequence.md"):
            check_sequence(nn.Linear(2, 2), self.config)

    def test_finds_a_row_that_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = Row(stacks=(StackRow("blocks", {"hidden": "img"}, ("img",)),), attention={"attn1": "img"})
        monkeypatch.setitem(ROWS, "WanTransformer3DModel", wrong)
        with pytest.raises(DeclarationError, match="says that blocks take 'hidden'"):
            check_sequence(CASES["wan"].build(), self.config)

    def test_a_class_may_bring_its_row(self) -> None:
        class Mine(type(CASES["wan"].build())):
            _sequence_row = replace(ROWS["WanTransformer3DModel"], whole=())

        model = CASES["wan"].build()
        model.__class__ = Mine
        assert check_sequence(model, self.config) is Mine._sequence_row

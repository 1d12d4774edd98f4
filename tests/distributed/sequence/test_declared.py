"""Declared plans carried out: diffusers' own and a stranger's, against one rank."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.config import ParallelConfig
from penstock.distributed import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
from penstock.distributed.mesh import Mesh, build_mesh
from penstock.distributed.sequence import declared, dispatch
from penstock.distributed.sequence.declared import apply_declared, check_declared
from penstock.distributed.sequence.plan import sequence_plan_of
from penstock.errors import DeclarationError, GenerationError
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of
from tests.zoo import denoisers

WIDTH = 16
TEXT = 7
SPLIT = SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True)
GATHER = SequenceParallelOutput(gather_dim=1, expected_dims=3)
SPLITS = [(2, 1), (1, 2), (2, 2)]


class Rope(nn.Module):
    """A rotation for each token of text and then of the picture, and a gain for those of the picture."""

    def forward(self, ids: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        angles = ids.sum(1, keepdim=True) * torch.linspace(0.1, 1.0, WIDTH // 2)
        return angles.cos(), angles[text.shape[1] :].sin().mean(1)[None, :, None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, angles: Tensor, pair: list[Tensor]) -> tuple[Tensor, Tensor]:
        scale, shift = pair
        tokens = torch.cat([text, image * scale + shift], dim=1)
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, 2))
        seen = F.scaled_dot_product_attention(query * angles, key * angles, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(seen)
        return tokens[:, text.shape[1] :], tokens[:, : text.shape[1]]


class Stranger(nn.Module):
    """A model of somebody's own, whose plan uses every kind of input."""

    _sp_plan: ClassVar[Any] = {
        "rope": {
            0: SequenceParallelPartialInput(split_dim=0, text_len_source="text", split_output=True),
            1: SequenceParallelInput(split_dim=1, split_output=True, auto_pad=True),
        },
        "blocks.0": {"image": SequenceParallelInput(1, 3, auto_pad=True, shard_group="picture")},
        "blocks.*": {"pair": [SPLIT, SPLIT]},
        "head": SequenceParallelOutput(gather_dim=-2, expected_dims=3, shard_group="picture"),
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rope = Rope()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, pair: list[Tensor]) -> Tensor:
        ids = torch.arange(float(text.shape[1] + image.shape[1]))[:, None]
        angles, gain = self.rope(ids, text=text)
        for block in self.blocks:
            image, text = block(image, text, angles, pair)
            image = image + gain
        return self.head(image)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def given(length: int) -> dict[str, Any]:
    pair = [noise(2, length, 1), noise(2, length, WIDTH)]
    return {"image": noise(2, length, WIDTH), "text": noise(2, TEXT, WIDTH), "pair": pair}


def meet(ulysses: int, ring: int) -> Mesh:
    return build_mesh(ParallelConfig(ulysses_degree=ulysses, ring_degree=ring), "cpu")


def error_of(model: nn.Module, inputs: dict[str, Any], mesh: Mesh, is_blind: bool = False) -> float:
    """The largest difference from one rank, as a share of what is allowed; asserts that nothing is left afterwards."""
    plan = sequence_plan_of(model)
    assert plan is not None
    plain_attention = F.scaled_dot_product_attention
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = _parts(model(**copy.deepcopy(inputs)))
        allowed = tolerance_of(model, lambda: _parts(model(**copy.deepcopy(inputs))), expected)
        undo = apply_declared(model, plan, mesh)
        if is_blind:
            alone = lambda sight, call, kernel: kernel(call.query, call.key, call.value, None)  # noqa: E731
            patch.setattr(dispatch, "attend", alone)
        differences = []
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*is not split: it has")
                found = _parts(model(**copy.deepcopy(inputs)))
            differences.append(difference(found, expected) / allowed)
        undo.run()
        assert all(torch.equal(one, other) for one, other in zip(_parts(model(**inputs)), expected, strict=True))
    assert F.scaled_dot_product_attention is plain_attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return max(differences)


def _parts(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def error_of_case(name: str, size: str, ulysses: int, ring: int, is_blind: bool = False) -> float:
    case = denoisers.CASES[name]
    return error_of(case.build(heads=3), case.inputs(size), meet(ulysses, ring), is_blind)


@pytest.mark.parametrize(("ulysses", "ring"), SPLITS)
@pytest.mark.parametrize("size", ["even", "odd", "short"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_diffusers_plans_give_what_one_rank_gives(name: str, size: str, ulysses: int, ring: int) -> None:
    assert max(run_ranks(ulysses * ring, error_of_case, name, size, ulysses, ring)) < 1


@pytest.mark.parametrize(("name", "size"), [("qwen_image", "masked_odd"), ("wan_ti2v", "odd"), ("flux2", "odd")])
def test_masks_and_levels_for_each_token_are_split_too(name: str, size: str) -> None:
    assert max(run_ranks(4, error_of_case, name, size, 2, 2)) < 1


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_without_the_others_tokens_the_result_differs(name: str) -> None:
    assert min(run_ranks(2, error_of_case, name, "even", 2, 1, True)) > 100


def error_of_stranger(length: int, ulysses: int, ring: int, is_blind: bool = False) -> float:
    return error_of(Stranger(), given(length), meet(ulysses, ring), is_blind)


@pytest.mark.parametrize(("ulysses", "ring"), SPLITS)
@pytest.mark.parametrize("length", [16, 13, 5, 1])
def test_every_kind_of_input(length: int, ulysses: int, ring: int) -> None:
    assert max(run_ranks(ulysses * ring, error_of_stranger, length, ulysses, ring)) < 1


def test_a_stranger_without_the_others_tokens_differs() -> None:
    assert min(run_ranks(2, error_of_stranger, 16, 2, 1, True)) > 100


@pytest.mark.parametrize("length", [2 * TEXT, 2 * TEXT - 1, 4 * TEXT])
def test_pieces_as_long_as_the_text_are_told_apart(length: int) -> None:
    assert max(run_ranks(2, error_of_stranger, length, 2, 1)) < 1


class Reader(nn.Module):
    """Image tokens that see each other and read a text; every token of the image may have a level of its own."""

    _sp_plan: ClassVar[Any] = {
        "": {"image": SequenceParallelInput(split_dim=1), "level": SequenceParallelInput(1, expected_dims=3)},
        "head": SequenceParallelOutput(gather_dim=1),
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor, level: Tensor | None = None) -> Tensor:
        if level is not None:
            image = image + (level if level.ndim == 3 else level[:, None])
        for keys in (image, text):
            key = self.read(keys)[:, None]
            image = image + F.scaled_dot_product_attention(image[:, None], key, key)[:, 0]
        return self.head(image)


def outcome(plan: Any, length: int, text: int, options: dict[str, Any]) -> tuple[str, list[str], float]:
    """(error, warnings, difference from one rank as a share of what is allowed) of two forwards of a reader."""
    model = Reader()
    image, text_tokens = noise(2, length, WIDTH), noise(2, text, WIDTH)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = model(image, text_tokens, **options)
        allowed = tolerance_of(model, lambda: [model(image, text_tokens, **options)], [expected])
        undo = apply_declared(model, plan, meet(2, 1))
        try:
            found = [model(image, text=text_tokens, **options) for _ in range(2)]
        except (GenerationError, ValueError) as error:
            return f"{type(error).__name__}: {error}", [str(one.message) for one in caught], -1.0
        finally:
            undo.run()
    share = max(difference([one], [expected]) for one in found) / allowed
    return "", [str(one.message) for one in caught], share


def outcomes(length: int, text: int, plan: Any = None, **options: Any) -> tuple[str, list[str], float]:
    told = run_ranks(2, outcome, plan or Reader._sp_plan, length, text, options)
    assert {one[:2] == told[0][:2] for one in told} == {True}
    return told[0][0], told[0][1], max(one[2] for one in told)


def test_whole_keys_need_no_exchange() -> None:
    error, warned, share = outcomes(16, 5)
    assert (error, warned) == ("", [])
    assert share < 1


def test_a_wrong_number_of_dims_is_warned_about_once() -> None:
    error, warned, share = outcomes(16, 5, level=noise(2, WIDTH))
    assert error == ""
    assert warned == ["Reader.level is not split: it has 2 dims in place of 3. Every rank keeps what it has."]
    assert share < 1
    error, warned, share = outcomes(16, 5, level=noise(2, 16, WIDTH))
    assert (error, warned) == ("", []) and share < 1


def test_without_auto_pad_a_length_must_divide() -> None:
    assert outcomes(15, 5)[0].startswith("ValueError: 15 tokens do not divide over 2 ranks")


def test_lengths_that_cannot_be_told_apart_are_an_error() -> None:
    assert outcomes(16, 8)[0].startswith("GenerationError: attention of Reader was given 8 tokens on each of 2 ranks")
    padded = {**Reader._sp_plan, "": {"image": SPLIT}}
    assert outcomes(16, 8, padded)[2] < 1


class Halves(Reader):
    """Attention within the first half of the tokens alone."""

    def forward(self, image: Tensor, text: Tensor, level: Tensor | None = None) -> Tensor:
        half = image[:, : image.shape[1] // 2][:, None]
        return self.head(torch.cat([F.scaled_dot_product_attention(half, half, half)[:, 0], image], 1))


def blind_forward() -> str:
    model = Halves()
    undo = apply_declared(model, {"": {"image": SPLIT}}, meet(2, 1))
    with torch.no_grad(), pytest.raises(GenerationError) as caught:
        model(noise(2, 16, WIDTH), noise(2, 5, WIDTH))
    undo.run()
    return str(caught.value)


def test_tokens_that_no_attention_sees_are_an_error() -> None:
    for told in run_ranks(2, blind_forward):
        assert told.startswith("attention of Halves saw 4 by 4 tokens, and none that were cut over 2 ranks")


def forward_without_torch() -> str:
    undo = apply_declared(model := Reader(), {"": {"image": SPLIT}, "head": GATHER}, meet(2, 1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), pytest.raises(GenerationError) as caught:
        patch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: query)
        model(noise(2, 16, WIDTH), noise(2, 5, WIDTH))
    undo.run()
    return str(caught.value)


def test_attention_that_never_comes_to_us_is_an_error() -> None:
    assert "no attention of Reader went through diffusers' backends" in run_ranks(2, forward_without_torch)[0]


def test_a_gather_of_other_tokens_is_an_error() -> None:
    assert "no stream that was cut has as many" in outcomes(16, 6, {"": {"text": SPLIT}, "head": GATHER})[0]
    grouped = {
        "": {"text": SequenceParallelInput(1, shard_group="text")},
        "head": SequenceParallelOutput(1, shard_group="text"),
    }
    assert "gave 16 tokens, and shard_group 'text' has 3" in outcomes(16, 6, grouped)[0]


def test_what_was_not_cut_is_not_gathered() -> None:
    plan = {"": {"image": SequenceParallelInput(1, expected_dims=4)}, "head": GATHER}
    error, warned, difference = outcomes(16, 5, plan)
    assert (error, len(warned), difference) == ("", 1, 0.0)


def test_tensors_and_specs_must_be_as_many() -> None:
    assert "the plan splits 2 tensors" in outcomes(16, 5, {"": {"image": [SPLIT, SPLIT]}})[0]
    assert (
        "head gave 1 tensors, and 2 are to be gathered"
        in outcomes(16, 5, {"": {"image": SPLIT}, "head": [GATHER] * 2})[0]
    )
    output = {"head": {1: SequenceParallelInput(1, split_output=True)}}
    assert "head gave 1 tensors, and output 1 is to be split" in outcomes(16, 5, output)[0]


def test_text_must_leave_an_image() -> None:
    partial = SequenceParallelPartialInput(1, 16)
    assert "16 of text leave none" in outcomes(16, 5, {"": {"image": partial}})[0]
    unknown = SequenceParallelPartialInput(1, "level")
    assert "'level' has, which is NoneType here" in outcomes(16, 5, {"": {"image": unknown}})[0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"heads": GATHER}, r"Stranger declares 'heads', and has no module 'heads' there"),
        ({"blocks.2": {"image": SPLIT}}, r"declares 'blocks.2', and has no module '2' there"),
        ({"forward": GATHER}, r"declares 'forward', and has no module 'forward'"),
        ({"blocks.*.*": {"image": SPLIT}}, r"declares 'blocks.\*.\*', which has more than one '\*'"),
        ({"head.*": {"input": SPLIT}}, r"declares 'head.\*': '\*' stands for the blocks of a ModuleList, not Linear"),
        (
            {"blocks.*": {"latents": SPLIT}},
            r"splits 'latents' of 'blocks.\*', and Block.forward takes image, text, ang",
        ),
        ({"head": SequenceParallelOutput(1, shard_group="x")}, r"gathers shard_group 'x' at 'head', and splits no"),
    ],
)
def test_what_a_plan_names_must_be_there(plan: Any, message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        check_declared(Stranger(), plan)
    with pytest.raises(DeclarationError, match=message):
        apply_declared(Stranger(), plan, build_mesh(ParallelConfig(), "cpu"))


def test_a_plan_that_breaks_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="an index means an output"):
        check_declared(Stranger(), {"rope": {0: SPLIT}})


@pytest.mark.parametrize(
    ("source", "length"),
    [
        (noise(5), 5),
        (noise(5, 3), 5),
        (torch.ones(2, 5).bool(), 5),
        (torch.zeros(5, 3).long(), 5),
        (noise(2, 5, 9), 5),
        (5, 5),
    ],
)
def test_where_the_length_of_a_text_is_read(source: Any, length: int) -> None:
    split = declared._Split(Stranger(), None)  # type: ignore[arg-type]
    assert split._text_length("text", "x", {"text": source}) == length
    assert split._text_length(4, "x", {}) == 4


def num_exchanges() -> dict[str, int]:
    mesh = meet(2, 1)
    model = Stranger()
    undo = apply_declared(model, Stranger._sp_plan, mesh)
    for group in mesh.groups.values():
        group.traffic.clear()
    with torch.no_grad():
        model(**given(16))
    undo.run()
    return {name: traffic.num_calls["all_gather"] for name, traffic in mesh.traffic().items()}


def test_what_is_exchanged() -> None:
    assert run_ranks(2, num_exchanges) == [{"sequence": 1, "ulysses": 2}] * 2


def failed_forward(kind: type[BaseException]) -> tuple[bool, float]:
    """Whether attention is plain after a forward that failed, and the next forward's difference from one rank."""

    def stop(module: nn.Module, args: Any) -> None:
        raise kind

    model, mesh, apart = Stranger(), meet(2, 1), noise(1, 2, 8, 4)
    with torch.no_grad():
        expected = model(**given(16))
        allowed = tolerance_of(model, lambda: [model(**given(16))], [expected])
        seen = F.scaled_dot_product_attention(apart, apart, apart)
        undo = apply_declared(model, Stranger._sp_plan, mesh)
        hook = model.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(kind):
            model(**given(16))
        hook.remove()
        is_plain = kind is KeyboardInterrupt or torch.equal(seen, F.scaled_dot_product_attention(apart, apart, apart))
        found = model(**given(16))
        undo.run()
    return is_plain, difference([found], [expected]) / allowed


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_ended_early_leaves_nothing(kind: type[BaseException]) -> None:
    for is_plain, share in run_ranks(2, failed_forward, kind):
        assert is_plain
        assert share < 1


def test_one_rank_is_left_as_it_is() -> None:
    model = Stranger()
    undo = apply_declared(model, Stranger._sp_plan, build_mesh(ParallelConfig(), "cpu"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    undo.run()

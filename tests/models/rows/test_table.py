"""Which row a denoiser has, and whether it fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor, nn

from penstock.errors import DeclarationError
from penstock.models.rows import refused, table
from penstock.models.rows.row import Row, StackRow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states


class Open(Block):
    def forward(self, hidden_states: Tensor, **others: Tensor) -> Tensor:
        return hidden_states


class Denoiser(nn.Module):
    def __init__(self, kind: type[Block] = Block, count: int = 2) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"blocks": nn.ModuleList(kind() for _ in range(count))})
        self.norm_out = nn.Identity()

    def forward(self, hidden_states: Tensor, samples: Tensor | None = None) -> Tensor:
        return hidden_states


class Child(Denoiser):
    pass


ROW = Row(
    stacks=(StackRow("inner.blocks", {"hidden_states": "img"}, ("img",)),),
    attention={"attn": "img"},
    ends={"norm_out": "img"},
    residuals={"samples": "img"},
)


def test_a_row_is_that_of_the_class_or_of_the_nearest_above(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.row_of(Child()) is None
    monkeypatch.setitem(table.ROWS, "Denoiser", ROW)
    assert table.row_of(Child()) is ROW
    own = replace(ROW, whole=("img",))
    monkeypatch.setitem(table.ROWS, "Child", own)
    assert table.row_of(Child()) is own
    assert table.row_of(Denoiser()) is ROW


def test_a_class_that_brings_its_row_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(ROW, whole=("img",))
    monkeypatch.setitem(table.ROWS, "Child", ROW)
    monkeypatch.setattr(Child, "_sequence_row", own, raising=False)
    assert table.row_of(Child()) is own


def test_a_class_that_is_refused_does_not_inherit_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.ROWS, "Denoiser", ROW)
    monkeypatch.setitem(refused.REFUSED, "Child", "it is too small")
    assert table.row_of(Child()) is None
    assert table.reason_of(Child()) == "it is too small"
    assert table.row_of(Denoiser()) is ROW
    assert table.reason_of(Denoiser()) is None


def test_blocks_are_found_by_a_dotted_path() -> None:
    denoiser = Denoiser()
    assert table.blocks_of(denoiser, ROW.stacks[0]) == tuple(denoiser.inner["blocks"])
    assert table.blocks_of(Denoiser(count=0), ROW.stacks[0]) == ()


def test_a_row_that_fits() -> None:
    table.check_row(Denoiser(), ROW)
    table.check_row(Denoiser(count=0), ROW)
    table.check_row(Denoiser(Open), replace(ROW, stacks=(StackRow("inner.blocks", {"rope": "img"}, ("img",)),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stacks": (StackRow("blocks", {"hidden_states": "img"}, ("img",)),)}, "'blocks', which is no list of blocks"),
        ({"stacks": (StackRow("norm_out", {}, ()),)}, "'norm_out', which is no list of blocks"),
        (
            {"stacks": (StackRow("inner.blocks", {"rope": "img"}, ("img",)),)},
            r"inner\.blocks take 'rope', and Block\.forward takes hidden_states, temb\. Correct the row",
        ),
        (
            {"residuals": {"controls": "img"}},
            r"it takes 'controls', and Denoiser\.forward takes",
        ),
        ({"refuses": {"cache": "it is whole"}}, "it takes 'cache'"),
        ({"attention": {"attn1": "img"}}, "the attention 'attn1', and no block has it"),
        ({"attention": {"attn": "img+txt"}}, r"attention over \['txt'\], which no block takes"),
        ({"ends": {"norm": "img"}}, "the module 'norm', and the class has none"),
        ({"between": {"face": "img"}}, "the module 'face', and the class has none"),
    ],
)
def test_a_row_that_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DeclarationError, match=message) as caught:
        table.check_row(Denoiser(), replace(ROW, **changes))
    assert "Denoiser" in str(caught.value)

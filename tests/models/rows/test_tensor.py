"""The table of layers that tensor parallelism cuts: every entry fits its class, and says what to do with each layer."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import pytest
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn

from penstock.errors import DeclarationError
from penstock.models.rows.tensor import BESIDE, COLWISE, GATED, PLANS, ROWWISE, Local, Split, tensor_plan_of
from tests.zoo.denoisers import CASES, others

LEFT_OUT = MappingProxyType(
    {
        "ChronoEditTransformer3DModel": r"\.add_|norm_added",  # of pictures
        "Kandinsky5Transformer3DModel": r"text_transformer_blocks\.\*\.cross",  # text sees itself alone
        "SkyReelsV2Transformer3DModel": r"\.add_|norm_added",
        "WanAnimateTransformer3DModel": r"\.add_|norm_added",
        "WanVACETransformer3DModel": r"\.add_|norm_added",
    }
)
"""By class, what its configuration here has not."""


def paths_by_class() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for case in (*CASES.values(), *others.CASES):
        denoiser = case.build()
        found.setdefault(type(denoiser).__name__, set()).update(path for path, _ in denoiser.named_modules())
    return found


def test_every_path_is_one_of_its_class() -> None:
    found = paths_by_class()
    for name, plan in PLANS.items():
        assert hasattr(diffusers, name)
        missing = [
            pattern
            for pattern in plan
            if not any(re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), path) for path in found[name])
        ]
        left_out = LEFT_OUT.get(name, "^$")
        assert [pattern for pattern in missing if not re.search(left_out, pattern)] == [], name


def test_the_nearest_class_above_counts() -> None:
    class Own(WanTransformer3DModel):
        """A class of somebody's own."""

    own: Any = object.__new__(Own)
    assert tensor_plan_of(own) is PLANS["WanTransformer3DModel"]
    assert tensor_plan_of(nn.Linear(1, 1)) is None


def test_the_plan_of_a_class_comes_first() -> None:
    class Declared(WanTransformer3DModel):
        """A class that declares a plan."""

        _tp_plan: ClassVar[dict[str, str]] = {"blocks.*.ffn.net.0.proj": "colwise", "blocks.*.ffn.net.2": "rowwise"}

    declared: Any = object.__new__(Declared)
    plan = tensor_plan_of(declared)
    assert plan is not None and list(plan) == list(Declared._tp_plan)
    layer, dims = nn.Linear(6, 8), []
    for style in plan.values():
        assert isinstance(style, Split)
        dims.append((style.dim, tuple(style.parts(layer, layer))))
    assert dims == [(0, (8,)), (1, (6,))]


def test_diffusers_packed_layers_keep_their_parts() -> None:
    flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8,
                                  joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))  # fmt: skip
    plan = tensor_plan_of(flux)
    assert plan is not None
    style, block = plan["single_transformer_blocks.*.proj_out"], flux.single_transformer_blocks[0]
    assert isinstance(style, Split) and style.dim == 1
    assert tuple(style.parts(block.proj_out, block)) == (16, 64)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"up": "sideways"}, "of Module gives 'up' the style 'sideways'.*\"colwise\", \"rowwise\", PackedColwise"),
        (["up"], "of Module is a list, no mapping.*PackedRowwiseParallel.*size at 1"),
    ],
)
def test_a_plan_that_is_none_is_an_error(plan: object, expected: str) -> None:
    denoiser: Any = nn.Module()
    denoiser._tp_plan = plan
    with pytest.raises(DeclarationError, match=expected):
        tensor_plan_of(denoiser)


def test_what_lies_side_by_side_is_cut_apart() -> None:
    layer = nn.Linear(5, 4)
    assert tuple(COLWISE.parts(layer, layer)) == (4,)
    assert tuple(COLWISE.parts(layer, diffusers.models.activations.GEGLU(2, 2))) == (2, 2)
    assert tuple(GATED.parts(layer, layer)) == (2, 2)
    assert tuple(ROWWISE.parts(layer, layer)) == (5,)
    assert tuple(BESIDE.parts(layer, layer)) == (4, 1)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_attention_is_told_how_many_heads_it_has(name: str) -> None:
    plan = PLANS[name]
    holders = {path.rpartition(".")[0] for path in plan if re.search(r"\.to_(q|query)$", path)}
    assert holders
    for holder in holders:
        style = plan[holder]
        assert isinstance(style, Local) and {"heads", "num_heads", "inner_dim"} <= set(style.attributes)

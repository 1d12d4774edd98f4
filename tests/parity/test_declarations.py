"""What a class declares about itself drives the streamer: roles, dotted paths, several stacks, what stays resident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

import penstock
from penstock.errors import DeclarationError
from tests import zoo


class Outer:
    """A pipeline that only holds another one, and says itself what is what."""

    _dit_modules: ClassVar = ["pipe.transformer"]
    _encoder_modules: ClassVar = ["pipe.text_encoder", "pipe.text_encoder_2"]
    _vae_modules: ClassVar = ["pipe.vae"]
    _resident_modules: ClassVar = ["pipe.transformer.time_text_embed"]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self) -> torch.Tensor:
        return zoo.tensors(zoo.run(self.pipe, "flux"))[0]


@pytest.fixture
def outer(zoo_folder: Callable[[str], Path]) -> Outer:
    return Outer(DiffusionPipeline.from_pretrained(zoo_folder("flux")))


def test_declared_paths_of_an_inner_pipeline_stream_and_residents_stay(outer: Outer) -> None:
    plain = outer()
    with penstock.apply(outer, offload="layerwise", check=True, trace=True) as placed:
        assert torch.equal(plain, outer())
        assert torch.equal(plain, outer())
        roles = {part.name: part.role for part in placed.plan.components}
        assert roles["pipe.transformer"] == "denoiser" and roles["pipe.text_encoder_2"] == "encoder"
        (resident,) = [unit for unit in placed.plan.units if unit.name == "pipe.transformer.time_text_embed"]
        assert resident.residency == "resident"
        assert placed.timeline is not None
        stays = [stay for stay in placed.timeline.residences if stay.unit == resident.name]
        assert len(stays) == 1 and stays[0].end_s is None


@pytest.mark.parametrize(
    ("name", "value", "streamed"),
    [
        ("_layerwise_offload_blocks_attrs", ["transformer_blocks", "single_transformer_blocks"], {"t", "s"}),
        ("_layerwise_offload_blocks_attrs", ["single_transformer_blocks"], {"s"}),
        ("_layerwise_offload_blocks_attr", "single_transformer_blocks", {"s"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*_layerwise_offload_blocks_attr is deprecated:DeprecationWarning")
def test_declared_stacks_are_the_units(
    outer: Outer, name: str, value: object, streamed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = outer()
    monkeypatch.setattr(FluxTransformer2DModel, name, value, raising=False)
    with penstock.apply(outer.pipe, offload="layerwise", check=True) as placed:
        assert torch.equal(plain, outer())
        units = [unit for unit in placed.plan.units if unit.component == "transformer" and unit.slot is not None]
        assert {unit.name.removeprefix("transformer.")[0] for unit in units} == streamed


def test_declaration_that_is_not_true_is_an_error_and_changes_nothing(
    outer: Outer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outer, "_vae_modules", ["pipe.decoder"])
    with pytest.raises(DeclarationError, match=r"Outer declares 'pipe\.decoder'"):
        penstock.apply(outer, offload="layerwise")
    assert penstock.placed_on(outer) is None

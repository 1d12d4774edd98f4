"""What surrounds a call: kept as it was, to the place in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from penstock.distributed.guidance.surroundings import Surroundings, hindrance, kept, random_state, settings_of

BASE = torch.arange(256.0).reshape(4, 8, 8)


@pytest.mark.parametrize(
    "tensor",
    [
        BASE,
        BASE[1:, 3],
        BASE[:, ::2, 1:6],
        BASE.transpose(0, 2),
        BASE[:1, :1].expand(4, 8, 8),
        BASE[0, 0, 0],
        BASE[:0],
        BASE.to(torch.bfloat16)[:, 1:],
        BASE > 7,
        torch.view_as_complex(BASE[..., :2]).conj(),
    ],
)
def test_a_kept_tensor_is_the_same_and_its_own(tensor: torch.Tensor) -> None:
    copy = kept({"a": [tensor, 3]})["a"][0]
    assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
    if tensor.numel() and not tensor.is_conj():
        assert copy.stride() == tensor.stride() and copy.data_ptr() % 256 == tensor.data_ptr() % 256
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_what_is_spread_out_costs_its_values_alone() -> None:
    copy = kept(torch.ones(1, 4).expand(1000, 4))
    assert copy.untyped_storage().nbytes() < 1024


def test_surroundings_are_restored_and_given_back() -> None:
    with torch.inference_mode():
        there = Surroundings.now()
    here = Surroundings.now()
    assert here != there and here == Surroundings.now()
    with there.restored():
        assert Surroundings.now() == there and torch.is_inference_mode_enabled()
        with here.restored():
            assert Surroundings.now() == here and torch.is_grad_enabled()
    assert Surroundings.now() == here


def attribute(module: nn.Module, name: str, value: Any) -> None:
    object.__setattr__(module, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: attribute(module, "forward", print),
        lambda module: attribute(module, "processor", object()),
        lambda module: vars(module).get("processor").__dict__.update(scale=[0.5]),
        lambda module: module.scaling.update(adapter=2.0),
        lambda module: attribute(module, "_disable_adapters", True),
        lambda module: attribute(module, "_active_adapter", ["other"]),
    ],
)
def test_settings_tell_a_change_of_what_calls_compute(change: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attribute(model[1], "processor", SimpleNamespace(scale=[1.0]))
    attribute(model[1], "scaling", {"adapter": 1.0})
    before = settings_of(model)
    assert settings_of(model) == before
    change(model[1])
    assert settings_of(model) != before


def test_hooks_of_diffusers_hinder() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert hindrance(model, (BASE, 1, "text", None, torch.float32)) == ""
    attribute(model[0], "_diffusers_hook", SimpleNamespace(hooks={}))
    assert hindrance(model, BASE) == ""
    model[0]._diffusers_hook.hooks["a cache"] = object()
    assert "hook of diffusers" in hindrance(model, BASE)


def test_gradients_hinder() -> None:
    wanted = torch.ones(2, requires_grad=True)
    assert "gradient" in hindrance(nn.Identity(), wanted)
    with torch.no_grad():
        assert hindrance(nn.Identity(), wanted) == ""


def test_drawing_changes_the_random_state() -> None:
    before = random_state(torch.device("cpu"))
    assert random_state(torch.device("cpu")) == before
    torch.rand(1)
    assert random_state(torch.device("cpu")) != before

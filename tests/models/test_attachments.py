"""What others have put on a module is found, and told by what it does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers.hooks as hooks
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, LayerSkipConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import CrossAttnStoreProcessor
from torch import nn

import penstock
from penstock.models import attachments
from penstock.models.attachments import UNKNOWN, Attached, Trait, attachments_of, marks_of
from penstock.models.components import discover
from tests import zoo

CPU = torch.device("cpu")


@pytest.fixture
def flux() -> Any:
    return zoo.build("flux").transformer


@pytest.mark.parametrize("name", ["flux", "wan21", "sdxl", "stranger", "ltx2", "qwen_image"])
def test_on_stock_pipelines_there_is_nothing(name: str) -> None:
    for component in discover(zoo.build(name)).components:
        assert attachments_of(component.module) == ()


def test_every_hook_of_diffusers_is_classified() -> None:
    homes = [module for _, module in inspect.getmembers(hooks, inspect.ismodule)]
    classes = {
        kind.__name__
        for home in homes
        for kind in vars(home).values()
        if inspect.isclass(kind) and issubclass(kind, ModelHook) and kind is not ModelHook
    }
    assert classes == set(attachments._HOOKS)


class Mine(ModelHook):
    """Nobody knows it."""


def test_an_unknown_hook_may_do_everything(flux: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(flux).register_hook(Mine(), "mine")
    (found,) = attachments_of(flux)
    assert found.traits == frozenset(Trait) and "Mine" in found.what and found.path == ""


def test_a_hook_that_only_borrows_a_known_name_is_unknown(flux: Any) -> None:
    kind = type("TaylorSeerCacheHook", (ModelHook,), {})
    HookRegistry.check_if_exists_or_initialize(flux).register_hook(kind(), "mine")
    assert attachments_of(flux)[0].traits == frozenset(Trait)


@pytest.mark.parametrize(
    ("put_on", "trait", "what"),
    [
        (lambda m: m.enable_cache(FirstBlockCacheConfig()), Trait.DECIDES, "FirstBlockCache"),
        (lambda m: apply_layerwise_casting(m, torch.float8_e4m3fn, torch.float32), Trait.CASTS_WEIGHTS, "casting"),
        (
            lambda m: apply_group_offloading(m, CPU, CPU, offload_type="leaf_level"),
            Trait.MOVES_WEIGHTS,
            "group offloading",
        ),
        (lambda m: cpu_offload(m, CPU), Trait.MOVES_WEIGHTS, "accelerate"),
        (
            lambda m: apply_layer_skip(m, LayerSkipConfig(indices=[1], fqn="transformer_blocks")),
            Trait.SKIPS_BLOCKS,
            "LayerSkip",
        ),
    ],
)
def test_what_libraries_put_on(put_on: Callable[[Any], Any], trait: Trait, what: str, flux: Any) -> None:
    put_on(flux)
    assert any(trait in found.traits and what in found.what for found in attachments_of(flux))


def test_a_hook_that_was_taken_off_is_gone(flux: Any) -> None:
    flux.enable_cache(FirstBlockCacheConfig())
    flux.disable_cache()
    assert attachments_of(flux) == ()


def counting(stock: Any) -> Any:
    count = 0

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return stock(*args, **kwargs)

    return forward


def test_a_forward_of_an_object_is_replaced(flux: Any) -> None:
    block = flux.transformer_blocks[0]
    block.forward = counting(block.forward)
    (found,) = attachments_of(flux)
    assert found.traits == UNKNOWN and found.path == "transformer_blocks.0" and "counting" in found.what


def test_a_replaced_forward_behind_a_hook_of_diffusers_is_seen(flux: Any) -> None:
    flux.forward = counting(flux.forward)
    apply_layerwise_casting(flux, torch.float8_e4m3fn, torch.float32)
    flux.enable_cache(FirstBlockCacheConfig())
    assert any("counting" in found.what for found in attachments_of(flux))


def test_a_forward_of_a_class_is_replaced(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = marks_of(flux)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", counting(FluxTransformer2DModel.forward))
    (found,) = attachments_of(flux)
    assert found.traits == UNKNOWN and "FluxTransformer2DModel.forward" in found.what
    assert marks_of(flux) != before
    monkeypatch.undo()
    assert attachments_of(flux) == ()


@pytest.mark.parametrize("name", ["__call__", "forward"])
def test_a_method_of_the_library_is_replaced(name: str, flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = marks_of(flux)
    monkeypatch.setattr(type(flux), name, counting(getattr(type(flux), name)))
    assert attachments_of(flux)[0].traits == UNKNOWN and marks_of(flux) != before


def test_another_method_of_an_object_is_replaced(flux: Any) -> None:
    block, before = flux.transformer_blocks[1], marks_of(flux)
    block.get_extra_state = counting(lambda: None)
    assert attachments_of(flux)[0].path == "transformer_blocks.1" and marks_of(flux) != before


def test_what_penstock_puts_on_is_not_foreign() -> None:
    pipeline: Any = zoo.build("wan21")
    with penstock.apply(pipeline, offload="layerwise", max_weight_memory="least", share_blocks=True):
        for component in discover(pipeline).components:
            assert attachments_of(component.module) == ()


def test_a_class_of_somebody_else_that_keeps_state(flux: Any) -> None:
    class Counting(FluxTransformer2DModel):
        """Counts."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Count."""
            self.num_calls = 1
            return super().forward(*args, **kwargs)

    class Plain(FluxTransformer2DModel):
        """Does not."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Call."""
            return super().forward(*args, **kwargs)

    stock = type(flux)
    flux.__class__ = Counting
    assert attachments_of(flux)[0].traits == UNKNOWN
    flux.__class__ = Plain
    assert attachments_of(flux) == ()
    flux.__class__ = type("Made", (stock,), {"forward": counting(stock.forward)})
    assert attachments_of(flux)[0].traits == UNKNOWN


class Wrapper(nn.Module):
    """A block in place of a stock one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.kept: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep."""
        self.kept = self.block(*args, **kwargs)
        return self.kept


def test_exchanged_blocks_are_seen(flux: Any) -> None:
    flux.transformer_blocks = nn.ModuleList(Wrapper(block) for block in flux.transformer_blocks)
    found = attachments_of(flux)
    assert {one.path for one in found} == {
        f"transformer_blocks.{index}" for index in range(len(flux.transformer_blocks))
    }
    assert all(one.traits == UNKNOWN for one in found)


def test_hooks_that_only_watch_are_left_alone(flux: Any) -> None:
    seen: list[Any] = []
    handle = flux.register_forward_hook(lambda *_: seen.append(1))
    assert attachments_of(flux) == ()
    handle.remove()
    flux.register_forward_pre_hook(lambda module, args: tuple(seen) or None)
    assert attachments_of(flux)[0].traits == UNKNOWN


def test_processors_that_keep_something() -> None:
    unet = zoo.build("sd15").unet
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(CrossAttnStoreProcessor())
    (found,) = attachments_of(unet)
    assert Trait.SHARES_STATE in found.traits and found.path.endswith("attn1")


def test_a_module_is_looked_at_again_only_where_something_changed(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    own = attachments.attachments_of
    monkeypatch.setattr(attachments, "attachments_of", lambda module: looks.append(1) or own(module))
    attached = Attached(flux)
    assert attached.now() == attached.now() == () and len(looks) == 1
    flux.enable_cache(FirstBlockCacheConfig())
    assert attached.now() and attached.now() and len(looks) == 2
    flux.disable_cache()
    assert attached.now() == () and len(looks) == 3

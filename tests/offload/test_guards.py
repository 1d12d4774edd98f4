"""What would move or change weights behind the streamer's back is refused; what changes nothing is let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from penstock.errors import ConfigError
from penstock.offload.guards import guard
from tests import zoo
from tests.offload.toys import CPU, Block, Pipeline

CUDA = torch.device("cuda", 1)


class Plain(nn.Module):
    """A module that has no `dtype`."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, dtype=dtype) for dtype in dtypes)


def guarded(device: torch.device = CPU) -> tuple[Any, nn.Module, Callable[[], None]]:
    pipeline, module = Pipeline(), Plain(torch.float32)
    return pipeline, module, guard(pipeline, [module], device)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(dtype=torch.float64),
        lambda m: m.to("cuda"),
        lambda m: m.to(1),
        lambda m: m.to(device="meta"),
        lambda m: m.to(torch.ones(1, dtype=torch.float16)),
        lambda m: m.to(torch.empty(1, device="meta")),
        lambda m: m.cuda(),
        lambda m: m.cuda(1),
        lambda m: m.xpu(),
        lambda m: m.train(),
        lambda m: m.train(True),
        lambda m: m.requires_grad_(),
        lambda m: m.requires_grad_(True),
    ],
)
def test_moving_casting_and_training_a_module_is_refused(ask: Callable[[Any], Any]) -> None:
    _, module, undo = guarded()
    weight = module.layers[0].weight
    weight.requires_grad = False
    with pytest.raises(ConfigError, match="Plain.*remove()"):
        ask(module)
    assert module.layers[0].weight is weight and weight.dtype is torch.float32 and not weight.requires_grad
    undo()
    module.half()
    assert module.layers[0].weight.dtype is torch.float16


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(CPU, torch.float32),
        lambda m: m.to(torch.float32),
        lambda m: m.to(device="cpu", non_blocking=True),
        lambda m: m.to(torch.ones(1)),
        lambda m: m.cpu(),
        lambda m: m.eval(),
        lambda m: m.requires_grad_(False),
    ],
)
def test_what_changes_nothing_is_let_through(ask: Callable[[Any], Any]) -> None:
    _, module, _ = guarded()
    assert ask(module) is module


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to("cpu", memory_format=torch.channels_last),
        lambda m: m.to(CPU, torch.float32, False, torch.channels_last_3d),
        lambda m: m.to(memory_format=torch.contiguous_format),
    ],
)
def test_a_memory_format_is_refused_and_not_ignored(ask: Callable[[Any], Any]) -> None:
    _, module, undo = guarded()
    with pytest.raises(ConfigError, match=r"memory format.*Call remove\(\) first, convert"):
        ask(module)
    assert module.to("cpu", memory_format=torch.preserve_format) is module
    undo()
    module.to(memory_format=torch.channels_last)


def test_eval_means_it() -> None:
    _, module, _ = guarded()
    assert module.training and not module.eval().training and not module.layers[0].training


def test_a_module_of_two_dtypes_is_in_neither() -> None:
    module = Plain(torch.float32, torch.float16)
    guard(Pipeline(), [module], CPU)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ConfigError):
            module.to(dtype)


@pytest.mark.parametrize(
    ("ask", "is_allowed"),
    [
        (lambda m: m.to("cuda:1"), True),
        (lambda m: m.to(1), True),
        (lambda m: m.cuda(1), True),
        (lambda m: m.cuda(device=1), True),
        (lambda m: m.cuda(torch.device("cuda", 1)), True),
        (lambda m: m.to("cuda"), False),
        (lambda m: m.cuda(), False),
        (lambda m: m.cuda(device=0), False),
        (lambda m: m.to("cuda:0"), False),
        (lambda m: m.cpu(), False),
        (lambda m: m.to("cpu"), False),
    ],
)
def test_devices_are_told_apart_by_number(ask: Callable[[Any], Any], is_allowed: bool) -> None:
    _, module, _ = guarded(CUDA)
    if is_allowed:
        assert ask(module) is module
    else:
        with pytest.raises(ConfigError, match="cuda:1"):
            ask(module)


REFUSED = [
    lambda p: p.to("cuda"),
    lambda p: p.to(torch.float16),
    lambda p: p.to("cpu", torch.float16),
    lambda p: p.enable_model_cpu_offload(),
    lambda p: p.enable_sequential_cpu_offload(device="cpu"),
    lambda p: p.enable_group_offload(torch.device("cpu")),
    lambda p: p.reset_device_map(),
    lambda p: p.fuse_lora(),
    lambda p: p.unfuse_lora(),
    lambda p: p.transformer.fuse_qkv_projections(),
    lambda p: p.transformer.enable_layerwise_casting(),
    lambda p: p.transformer.half(),
    lambda p: p.text_encoder.to("meta"),
    lambda p: p.vae.float(),
]


def test_a_real_pipeline_is_guarded_and_free_again() -> None:
    pipeline = zoo.build("flux")
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    before = [dict(vars(owner)) for owner in (pipeline, *modules)]
    undo = guard(pipeline, modules, CPU)
    for ask in REFUSED:
        with pytest.raises(ConfigError, match="penstock"):
            ask(pipeline)
    assert pipeline.to("cpu") is pipeline and pipeline.to(torch.float32) is pipeline
    assert pipeline.to("cpu", silence_dtype_warnings=True) is pipeline
    assert [part for part in pipeline.components.values() if isinstance(part, nn.Module)] == modules
    undo()
    undo()
    assert [dict(vars(owner)) for owner in (pipeline, *modules)] == before


def test_a_method_of_its_own_is_put_back() -> None:
    block = Block()
    object.__setattr__(block, "half", print)
    undo = guard(Pipeline(), [block], CPU)
    with pytest.raises(ConfigError):
        block.half()
    undo()
    assert vars(block)["half"] is print

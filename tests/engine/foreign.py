"""What others put on pipelines, for tests: caches, counters, wrappers, hooks. None of it is penstock's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from torch import nn

CPU = torch.device("cpu")
STEPS = 8
ALWAYS = (-1, 1001)


def pyramid() -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALWAYS,
        cross_attention_timestep_skip_range=ALWAYS,
        current_timestep_callback=lambda: 500,
    )


def stepwise() -> Callable[[], int]:
    """A timestep that is outside of FasterCache's range at first."""
    asked = iter([*[1000] * 30, *[500] * 10_000])
    return lambda: next(asked)


def faster() -> FasterCacheConfig:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=stepwise(),
    )


CACHES: dict[str, Callable[[], Any]] = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=0.8),
    "mag": lambda: MagCacheConfig(
        threshold=0.2, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)
    ),
    "taylorseer": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1, use_lite_mode=True
    ),
    "pyramid": pyramid,
    "faster": faster,
}


def denoisers(pipeline: Any) -> list[Any]:
    names = ("transformer", "transformer_2", "unet")
    return [found for name in names if (found := pipeline.components.get(name)) is not None]


def blocks_of(denoiser: nn.Module) -> nn.ModuleList:
    """The longest list of blocks."""
    return max((part for part in denoiser.modules() if isinstance(part, nn.ModuleList)), key=len)


def cache(pipeline: Any, kind: str) -> None:
    for denoiser in denoisers(pipeline):
        denoiser.enable_cache(CACHES[kind]())


def count_by_closure(module: nn.Module) -> None:
    """Answers every other call with what the call before gave, as caches do."""
    stock, kept, count = module.forward, None, 0

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal kept, count
        count += 1
        if count % 2:
            kept = stock(*args, **kwargs)
        return kept

    module.forward = forward  # type: ignore[method-assign]


def count_in_blocks(pipeline: Any) -> None:
    """One counter for all blocks: each gives in every other call what it gave in the call before."""
    for denoiser in denoisers(pipeline):
        blocks = blocks_of(denoiser)
        counts, kept = [0], {}
        for block in blocks:
            block.forward = _counting(block.forward, len(blocks), counts, kept)  # type: ignore[method-assign]


def _counting(stock: Any, num_blocks: int, counts: list[int], kept: dict[Any, Any]) -> Any:
    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        is_skipped = counts[0] // num_blocks % 2
        counts[0] += 1
        if not is_skipped or stock not in kept:
            kept[stock] = stock(*args, **kwargs)
        return kept[stock]

    return forward


def count_around(pipeline: Any) -> None:
    for denoiser in denoisers(pipeline):
        count_by_closure(denoiser)


def count_by_attribute(pipeline: Any) -> None:
    """As TeaCache does: the counter lies on the module."""
    for denoiser in denoisers(pipeline):
        stock = denoiser.forward

        def forward(self: Any, *args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            self.cnt = getattr(self, "cnt", 0) + 1
            if self.cnt % 2:
                self.previous = stock(*args, **kwargs)
            return self.previous

        denoiser.forward = forward.__get__(denoiser)


def timed(pipeline: Any) -> None:
    """A wrapper without state."""
    for denoiser in denoisers(pipeline):
        stock = denoiser.forward
        denoiser.forward = functools.wraps(stock)(lambda *args, stock=stock, **kwargs: stock(*args, **kwargs))


class Keeping(nn.Module):
    """A block of somebody else's, around a stock one; it keeps a result."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.kept: Any = None
        self.count = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every other result is the one before."""
        self.count += 1
        if self.count % 2:
            self.kept = self.block(*args, **kwargs)
        return self.kept


def exchange_blocks(pipeline: Any) -> None:
    for denoiser in denoisers(pipeline):
        blocks = blocks_of(denoiser)
        for index, block in enumerate(list(blocks)):
            blocks[index] = Keeping(block)


class StrangeHook(ModelHook):
    """A hook that nobody knows."""


def strange_hook(pipeline: Any) -> None:
    for denoiser in denoisers(pipeline):
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(StrangeHook(), "strange")


def inject_by_hook(pipeline: Any) -> None:
    """A forward hook that gives the other prediction what it has seen in this one."""
    for denoiser in denoisers(pipeline):
        seen: list[Any] = []

        def inject(module: Any, args: Any, output: Any, seen: list[Any] = seen) -> Any:
            seen.append(output)
            return seen[-2] if len(seen) % 2 == 0 else output

        denoiser.register_forward_hook(inject)


def cast(module: nn.Module) -> None:
    apply_layerwise_casting(module, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(module: nn.Module, kind: str = "leaf_level", path: Path | None = None) -> None:
    num_blocks = 1 if kind == "block_level" else None
    folder = str(path) if path is not None else None
    apply_group_offloading(
        module, CPU, CPU, offload_type=kind, num_blocks_per_group=num_blocks, offload_to_disk_path=folder
    )


WEIGHT_OWNERS: dict[str, Callable[[nn.Module], Any]] = {
    "group leaf": group_offload,
    "group block": lambda module: group_offload(module, "block_level"),
    "casting": cast,
    "accelerate": lambda module: cpu_offload(module, CPU),
    "dispatch": lambda module: dispatch_model(module, {"": "cpu"}, force_hooks=True),
}

"""The bytes on the device are those promised: counted by walking all live tensors, not by asking the streamer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import penstock
from tests import zoo
from tests.turns import by_turns

FAMILIES = ["flux", "flux2", "wan22", "qwen_image", "hunyuan_video15", "ltx2", "sdxl"]


def mapped() -> list[tuple[int, int]]:
    """Address ranges of mapped checkpoints: reclaimable by the system, and not the device's."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def live_bytes(checkpoints: list[tuple[int, int]]) -> int:
    """Bytes of all storages that any tensor of this process refers to, but for mapped files."""
    storages: dict[int, int] = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(
        size for address, size in storages.items() if not any(begin <= address < end for begin, end in checkpoints)
    )


@pytest.fixture(autouse=True)
def only_new_objects() -> Iterator[None]:
    """Objects of before the test are not walked: they do not change, and there are a million."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Sampler:
    """Takes a sample whenever a module that owns a weight matrix has run."""

    def __init__(self, pipeline: Any) -> None:
        self.samples: list[int] = []
        self._checkpoints = mapped()
        self._handles = [
            module.register_forward_hook(self._sample)
            for part in pipeline.components.values()
            if isinstance(part, torch.nn.Module)
            for module in part.modules()
            if any(p is not None and p.dim() > 1 for p in module._parameters.values())
        ]

    def _sample(self, *_: object) -> None:
        self.samples.append(live_bytes(self._checkpoints))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def samples(pipeline: Any, name: str) -> list[int]:
    gc.collect()
    sampler = Sampler(pipeline)
    zoo.run(pipeline, name, num_inference_steps=2)
    sampler.remove()
    return sampler.samples


def most_weight_bytes(name: str, folder: Path, **options: Any) -> tuple[int, int]:
    """The most bytes that streaming ever adds to the plain run at the same moment, and what was promised."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    plain = samples(pipeline, name)
    with penstock.apply(pipeline, prompt_cache=0, **options) as placed:
        streamed = samples(pipeline, name)
        promised = placed.plan.promised_bytes
    assert len(plain) == len(streamed) > 20
    return max(with_weights - without for with_weights, without in zip(streamed, plain, strict=True)), promised


@pytest.mark.parametrize(
    ("name", "mode"), by_turns([(name, mode) for name in FAMILIES for mode in ("sequential", "layerwise")], 6)
)
def test_live_storages_stay_within_the_promise(name: str, mode: str, zoo_folder: Callable[[str], Path]) -> None:
    most, promised = most_weight_bytes(name, zoo_folder(name), offload=mode, max_weight_memory="least")
    stand_ins = 64 * 1024  # a few bytes per weight that is elsewhere, and results of the allocator's rounding
    assert 0 < most <= promised + stand_ins


def test_weights_that_all_stay_would_break_a_smaller_promise(zoo_folder: Callable[[str], Path]) -> None:
    """The negative control: the same count, for a run that keeps everything."""
    _, promised = most_weight_bytes("flux", zoo_folder("flux"), offload="layerwise", max_weight_memory="least")
    most, _ = most_weight_bytes("flux", zoo_folder("flux"), offload="layerwise", max_weight_memory="1GiB")
    assert most > promised + 64 * 1024


def test_twenty_runs_leave_memory_flat(zoo_folder: Callable[[str], Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder("flux"))
    with penstock.apply(pipeline, offload="layerwise"):
        after = []
        for seed in range(20):
            zoo.run(pipeline, "flux", seed=seed, num_inference_steps=1, prompt=f"prompt {seed % 3}")
            gc.collect()
            after.append(live_bytes(mapped()))
    assert len(set(after[4:])) == 1


def test_two_experts_are_never_on_the_device_together(zoo_folder: Callable[[str], Path]) -> None:
    """Wan 2.2 changes its denoiser in the middle of a run."""
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder("wan22"))
    with penstock.apply(pipeline, offload="sequential", max_weight_memory="least", trace=True) as placed:
        zoo.run(pipeline, "wan22")
        assert placed.timeline is not None
        stays = {
            name: [(stay.begin_s, stay.end_s) for stay in placed.timeline.residences if stay.unit == name]
            for name in ("transformer", "transformer_2")
        }
    assert stays["transformer"] and stays["transformer_2"]
    for begin_s, end_s in stays["transformer"]:
        assert end_s is not None
        assert all(other_s >= end_s or (until_s or end_s) <= begin_s for other_s, until_s in stays["transformer_2"])

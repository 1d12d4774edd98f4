"""Which orders may share a call of the pipeline, and that sharing one changes no picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from penstock.engine.batches import goes_with
from penstock.request import GenerationRequest
from penstock.wire import Ended, FileFormat, Lora, Made, Order, OrderEvent
from tests.engines import made, order, running

ONE = Order(id="1", request=GenerationRequest(prompt="a", seed=1), folder="1")


def other(**values: Any) -> Order:
    return Order(id="2", request=replace(ONE.request, prompt="b", seed=2, **values), folder="2")


def test_another_prompt_and_seed_go_together() -> None:
    assert goes_with(ONE, other())


@pytest.mark.parametrize(
    "values",
    [
        {"width": 64},
        {"num_inference_steps": 3},
        {"num_images": 2},
        {"negative_prompt": "c"},
        {"image": "a.png"},
        {"pictures": {"mask": ("a.png",)}},
        {"arguments": {"guidance_scale": 2.0}},
    ],
)
def test_another_setting_does_not(values: dict[str, Any]) -> None:
    assert not goes_with(ONE, other(**values))


def test_what_is_done_with_the_results_counts_as_well() -> None:
    change = msgspec.structs.replace
    assert not goes_with(ONE, change(other(), format=FileFormat(name="webp")))
    assert not goes_with(ONE, change(other(), loras=(Lora(name="a", path="a"),)))
    assert not goes_with(ONE, change(other(), num_partials=1))
    assert not goes_with(change(ONE, num_partials=1), other())


def test_pictures_of_a_batch_are_those_of_each_alone(tmp_path: Path) -> None:
    engine = running(max_batch_size=4)
    prompts = ("a red circle", "a green square above a blue circle", "a yellow triangle")
    alone = [
        made(list(engine.events(order(tmp_path, f"alone-{seed}", prompt=prompt, seed=seed))))[0]
        for seed, prompt in enumerate(prompts)
    ]
    heard: SimpleQueue[OrderEvent] = SimpleQueue()
    engine.submit(order(tmp_path, "first", num_inference_steps=40), heard.put)  # meanwhile the others gather
    for seed, prompt in enumerate(prompts):
        engine.submit(order(tmp_path, f"batch-{seed}", prompt=prompt, seed=seed), heard.put)
    engine.submit(order(tmp_path, "batch-9", seed=9), heard.put)
    engine.cancel("batch-9")
    events: list[OrderEvent] = []
    while sum(isinstance(event, Ended) for event in events) < 5:
        events.append(heard.get(timeout=60))
    files = {event.id: event.file for event in events if isinstance(event, Made)}
    for seed, file in enumerate(alone):
        pixels, wanted = (np.asarray(Image.open(path), dtype=int) for path in (files[f"batch-{seed}"].path, file.path))
        assert np.abs(pixels - wanted).max() <= 1
    ended = {event.id: event for event in events if isinstance(event, Ended)}
    assert ended["batch-0"].timings.denoise_s == ended["batch-2"].timings.denoise_s  # one call
    assert ended["batch-9"].failure is not None and ended["batch-9"].failure.code == "cancelled"

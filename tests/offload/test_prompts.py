"""Encoded prompts are kept by what the call depends on, up to so many bytes, and handed out as copies."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from penstock.offload.prompts import PromptCache
from tests import zoo
from tests.offload.toys import streamed

WIDE = 1 << 20


class Encoding:
    """A pipeline that counts its encodings."""

    def __init__(self) -> None:
        self.text_encoder = nn.Linear(2, 2)
        self.tokenizer = SimpleNamespace(name="tokens")
        self.num_encoded = 0

    def encode_prompt(self, prompt: Any, image: Any = None, *, length: int = 8) -> tuple[Any, ...]:
        """Two tensors and something else."""
        self.num_encoded += 1
        return torch.full((length,), float(self.num_encoded)), [None, torch.ones(2)], "mask"


def cached(max_bytes: int = WIDE, pipeline: Any = None) -> tuple[Any, PromptCache]:
    pipeline = pipeline or Encoding()
    cache = PromptCache(pipeline, max_bytes)
    cache.install()
    return pipeline, cache


def test_a_repeated_prompt_needs_no_encoder() -> None:
    pipeline, cache = cached()
    first = pipeline.encode_prompt("fox", length=4)
    again = pipeline.encode_prompt("fox", length=4)
    assert (pipeline.num_encoded, cache.num_hits, cache.num_bytes) == (1, 1, 4 * 4 + 2 * 4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1][1], again[1][1])
    assert again[1][0] is None and again[2] == "mask"


def test_results_are_copies() -> None:
    pipeline, _ = cached()
    for _ in range(3):
        found = pipeline.encode_prompt("fox")
        assert found[0].tolist() == [1.0] * 8
        found[0].zero_()
        found[1].append("mine")


def image(shade: int, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (2, 2), (shade, 0, 0)).convert(mode)


def palette(shade: int) -> Image.Image:
    made = Image.new("P", (2, 2), 0)
    made.putpalette([shade, 0, 0])
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("fox", "Fox"),
        (["fox"], ["fox", "fox"]),
        (["fox"], ("fox",)),
        (1, True),
        (1, 1.0),
        (None, ""),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.tensor([1.0, 2.0])),
        (torch.ones(4), torch.ones(2, 2)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (image(1), image(2)),
        (image(1), image(1, "RGBA")),
        (palette(1), palette(2)),
        ([image(1), "fox"], [image(2), "fox"]),
        (torch.float16, torch.float32),
        (torch.device("cpu"), torch.device("meta")),
    ],
)
def test_what_differs_is_told_apart_and_what_equals_hits(one: Any, other: Any) -> None:
    pipeline, cache = cached()
    for value in (one, other):
        for _ in range(2):
            pipeline.encode_prompt("a", value)
            pipeline.encode_prompt("a", image=value)
    assert pipeline.num_encoded == 4 and cache.num_hits == 4  # by position and by name are two calls


def test_equal_pictures_and_tensors_hit_though_they_are_others() -> None:
    pipeline, cache = cached()
    for make in (lambda: torch.zeros(0), lambda: torch.arange(6).reshape(2, 3).t(), lambda: image(3)):
        for _ in range(2):
            pipeline.encode_prompt("a", make())
    assert cache.num_hits == 3


@pytest.mark.parametrize("value", [{"scale": 1}, object(), torch.Generator(), ["fox", object()]])
def test_what_cannot_be_told_is_not_kept(value: Any) -> None:
    pipeline, cache = cached()
    for _ in range(2):
        pipeline.encode_prompt("a", value)
    assert (pipeline.num_encoded, cache.num_hits, cache.num_bytes) == (2, 0, 0)


def test_the_least_recently_used_go_first() -> None:
    pipeline, cache = cached(3 * 40)  # 32 bytes and 8
    for prompt in ("a", "b", "c", "a", "d"):  # d drives out b
        pipeline.encode_prompt(prompt)
    assert (pipeline.num_encoded, cache.num_hits, cache.num_bytes) == (4, 1, 120)
    for prompt in ("a", "c", "d", "b"):
        pipeline.encode_prompt(prompt)
    assert (pipeline.num_encoded, cache.num_hits) == (5, 4)


def test_what_is_larger_than_all_is_not_kept_and_drives_nothing_out() -> None:
    pipeline, cache = cached(100)
    pipeline.encode_prompt("a")
    pipeline.encode_prompt("a", length=1000)
    pipeline.encode_prompt("a")
    assert cache.num_hits == 1 and cache.num_bytes == 40


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer"])
def test_another_encoder_or_tokenizer_encodes_anew_even_at_the_same_address(name: str) -> None:
    pipeline, cache = cached()
    for number in range(1, 20):  # a freed object's address is soon the next one's
        setattr(pipeline, name, nn.Linear(2, 2) if name == "text_encoder" else SimpleNamespace(name="tokens"))
        pipeline.encode_prompt("a")
        assert (pipeline.num_encoded, cache.num_hits) == (number, 0)


def test_adapters_in_an_encoder_are_not_kept() -> None:
    pipeline, cache = cached()
    pipeline.encode_prompt("a")
    pipeline.text_encoder.peft_config = {"default": object()}
    pipeline.encode_prompt("a")
    pipeline.encode_prompt("a")
    del pipeline.text_encoder.peft_config
    pipeline.encode_prompt("a")
    assert (pipeline.num_encoded, cache.num_hits) == (3, 1)


def test_guidance_that_an_encoder_reads_from_its_pipeline_counts() -> None:
    pipeline, cache = cached()
    for guidance in (1.0, 5.0, 1.0):
        pipeline._guidance_scale = guidance
        pipeline.encode_prompt("a")
    assert (pipeline.num_encoded, cache.num_hits) == (2, 1)


def test_inference_tensors_are_kept_apart() -> None:
    pipeline, cache = cached()
    with torch.inference_mode():
        pipeline.encode_prompt("a")
    assert not pipeline.encode_prompt("a")[0].is_inference() and cache.num_hits == 0


def test_install_keeps_the_signature_and_remove_the_method() -> None:
    pipeline, cache = cached()
    assert inspect.signature(pipeline.encode_prompt) == inspect.signature(Encoding().encode_prompt)
    pipeline.encode_prompt("a")
    cache.remove()
    cache.remove()
    assert "encode_prompt" not in vars(pipeline) and cache.num_bytes == 0
    pipeline.encode_prompt("a")
    assert pipeline.num_encoded == 2


def test_a_method_of_its_own_is_put_back() -> None:
    pipeline = Encoding()
    pipeline.encode_prompt = own = lambda prompt: torch.ones(1)
    _, cache = cached(pipeline=pipeline)
    assert pipeline.encode_prompt is not own and pipeline.encode_prompt("a") == 1
    cache.remove()
    assert pipeline.encode_prompt is own


@pytest.mark.parametrize(("pipeline", "max_bytes"), [(SimpleNamespace(), WIDE), (Encoding(), 0)])
def test_nothing_is_wrapped_where_nothing_can_be_kept(pipeline: Any, max_bytes: int) -> None:
    before = dict(vars(pipeline))
    _, cache = cached(max_bytes, pipeline)
    assert vars(pipeline) == before
    cache.remove()
    assert vars(pipeline) == before


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan21"])
def test_a_real_pipeline_asks_its_encoders_once(name: str) -> None:
    plain = [zoo.tensors(zoo.run(zoo.build(name), name, seed=seed)) for seed in (0, 1)]
    pipeline = zoo.build(name)
    with streamed(pipeline, 1) as streamer:
        _, cache = cached(pipeline=pipeline)
        stays = []
        for seed in (0, 1):
            assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, name, seed=seed)), plain[seed]))
            assert streamer.timeline is not None
            stays.append(sum(stay.unit.startswith("text_encoder") for stay in streamer.timeline.residences))
        assert cache.num_hits == 1 and stays[0] == stays[1] > 0
        cache.remove()

"""The shipped model, through the public interface: it follows prompts, and says so when it cannot know one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from typer.testing import CliRunner

import penstock
from checker import check
from grammar import pair_prompts, single_prompts
from penstock.cli.app import app

PROMPTS = [*single_prompts()[::3], *pair_prompts(held_out=True)[::12]]


@pytest.fixture(scope="module")
def demo() -> Any:
    return penstock.load("demo")


def test_classes_are_stock_and_both_kinds_of_block_are_there(demo: Any) -> None:
    assert type(demo) is FluxPipeline
    assert type(demo.transformer) is FluxTransformer2DModel and type(demo.vae) is AutoencoderKL
    assert demo.transformer.transformer_blocks and demo.transformer.single_transformer_blocks


def test_prompts_are_followed(demo: Any) -> None:
    right = []
    for seed, prompt in enumerate(PROMPTS):
        request = penstock.GenerationRequest(prompt=prompt, seed=seed)
        (result,) = penstock.generate(demo, request)
        right.append(check(result.images[0], prompt).everything)
    assert sum(right) >= 0.95 * len(right) - 1, [p for p, ok in zip(PROMPTS, right, strict=True) if not ok]


def test_a_bare_stock_call_is_right_as_well(demo: Any) -> None:
    """All of diffusers' defaults: 28 steps, 512 text tokens, and the size that penstock set."""
    prompt = "a green triangle below a yellow square"
    picture = demo(prompt, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (64, 64)
    assert check(picture, prompt).everything


def test_readme_prompt_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = "a red circle left of a blue square"
    result = CliRunner().invoke(app, ["generate", "demo", prompt, "--seed", "0"])
    assert result.exit_code == 0 and result.stderr == ""
    with Image.open("out.png") as picture:
        assert check(picture, prompt).everything


def test_prompt_outside_the_grammar_runs_and_says_what_the_model_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "demo", "a dog on a skateboard", "--steps", "2"])
    assert result.exit_code == 0 and Path("out.png").exists()
    assert "note: demo was trained for prompts like: a {red|green|blue|yellow} {circle" in result.stderr
    told = json.loads(CliRunner().invoke(app, ["generate", "demo", "a dog", "--steps", "2", "--json"]).stdout)
    assert len(told["notes"]) == 1

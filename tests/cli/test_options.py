"""Flags come from dataclasses, and every one of them reaches what it sets."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from penstock.cli.options import RequestOptions, command
from penstock.config import LoadConfig
from penstock.errors import RequestError


def invoke(*arguments: str) -> dict[str, Any]:
    """Run a command that keeps what it was given."""
    got: dict[str, Any] = {}

    @command
    def keep(
        model: str,
        prompt: Annotated[str | None, typer.Argument()] = None,
        *,
        request: RequestOptions,
        load: LoadConfig,
    ) -> None:
        got.update(model=model, prompt=prompt, request=request.request(prompt), load=load)

    app = typer.Typer()
    app.command()(keep)
    result = CliRunner().invoke(app, arguments)
    got.update(exit_code=result.exit_code, output=result.output)
    return got


def test_every_flag_arrives() -> None:
    got = invoke(
        *("m", "a prompt", "--negative-prompt", "n", "--size", "64x48", "--steps", "4", "--num-frames", "9"),
        *("--fps", "12", "--num-images", "2", "--seed", "7", "--image", "in.png", "--set", "a=1", "--set", "b=x=y"),
        *("--device", "cpu", "--dtype", "bf16", "--variant", "fp16", "--revision", "r", "--trust-remote-code"),
    )
    assert got["exit_code"] == 0, got["output"]
    assert got["load"] == LoadConfig(device="cpu", dtype="bf16", variant="fp16", revision="r", trust_remote_code=True)
    request = got["request"]
    assert (request.width, request.height) == (64, 48)
    assert request.arguments == {"a": "1", "b": "x=y"}
    assert request.frame_rate == 12
    for name in ("negative_prompt", "num_inference_steps", "num_frames", "num_images", "seed", "image", "prompt"):
        assert getattr(request, name) is not None


def test_defaults_are_those_of_the_dataclasses() -> None:
    got = invoke("m")
    assert got["load"] == LoadConfig()
    assert got["request"] == RequestOptions().request(None)


def test_every_field_has_a_flag_and_a_help_text() -> None:
    output = invoke("--help")["output"]
    for group in (RequestOptions, LoadConfig):
        for item in dataclasses.fields(group):
            assert "--" + item.name.replace("_", "-") in output
            assert item.metadata["help"]


@pytest.mark.parametrize("size", ["64", "64x", "x64", "64*64", "-64x64", "64x64x64"])
def test_size_that_is_none(size: str) -> None:
    with pytest.raises(RequestError, match="is not WIDTHxHEIGHT"):
        RequestOptions(size=size).request(None)


@pytest.mark.parametrize("setting", ["steps", "=3", "a b=3", ""])
def test_setting_that_is_none(setting: str) -> None:
    with pytest.raises(RequestError, match="is not NAME=VALUE"):
        RequestOptions(set=[setting]).request(None)


def test_value_out_of_range_is_one_line_and_exit_code_2() -> None:
    got = invoke("m", "--device", "gpu")
    assert got["exit_code"] == 2
    assert got["output"].startswith("error: device='gpu' is not a device.")

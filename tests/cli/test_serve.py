"""`penstock serve`: from flags to a running server."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from penstock.cli.app import app
from penstock.cli.serve import KEYS_VARIABLE, with_keys
from penstock.server.settings import ServeConfig
from tests import processes


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command would have run, instead of running it."""
    got: dict[str, Any] = {}

    def keep(settings: ServeConfig, engine: Any, **more: Any) -> int:
        got.update(settings=settings, **more)
        engine.close()
        return 0

    monkeypatch.setattr("penstock.server.process.run", keep)
    return got


def serve(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", "demo", *arguments])


def test_every_flag_reaches_its_setting(started: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "host": "0.0.0.0",
        "port": 1234,
        "api_key": ["a", "b"],
        "served_model_name": "painter",
        "max_queue": 3,
        "max_batch_size": 2,
        "max_images": 4,
        "max_pixels": "64x64",
        "max_steps": 5,
        "max_frames": 6,
        "max_upload": "1MiB",
        "storage": "memory:",
        "database": "sqlite:///x",
        "max_storage": "2GiB",
        "min_free_space": "1GiB",
        "ttl_s": 7,
        "server_name": "alpha",
        "lora_dir": str(tmp_path),
        "allow_remote_media": ["a.org", "*.b.org"],
        "allow_host": ["gpu.example.org"],
        "trusted_proxy": ["127.0.0.1", "10.0.0.0/8"],
        "start_timeout_s": 8.0,
        "step_timeout_s": 9.0,
        "rank_timeout_s": 10.0,
        "log_format": "json",
        "no_auth": True,
    }
    assert given.keys() == {item.name for item in dataclasses.fields(ServeConfig)}
    flags = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [part for one in _listed(value) for part in (flag, str(one))]
    result = serve(*flags, "--offload", "layerwise", "--data-parallel-size", "2")
    assert result.exit_code == 0, result.output
    assert dataclasses.asdict(started["settings"]) == given
    assert started["options"]["load"]["offload"] == "layerwise"
    assert started["options"]["parallel"]["data_parallel_size"] == 2 and started["model"] == "demo"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_keys_of_the_environment(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, " sk-ann, ,sk-bob,sk-ann")
    assert serve("--api-key", "sk-eve").exit_code == 0
    assert started["settings"].api_key == ["sk-eve", "sk-ann", "sk-bob"]
    assert with_keys(ServeConfig(), "").api_key == []


@pytest.mark.parametrize(
    "flags", [("--port", "70000"), ("--max-queue", "0"), ("--log-format", "xml"), ("--storage", "x:")]
)
def test_settings_out_of_range_are_usage_errors(started: dict[str, Any], flags: tuple[str, str]) -> None:
    result = serve(*flags)
    assert result.exit_code == 2 and result.output.startswith("error: ") and not started


def test_a_launchers_rank_is_refused(started: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    result = serve()
    assert result.exit_code == 2 and "starts its ranks itself" in result.output and not started


def test_from_the_command_line_to_a_picture(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), KEYS_VARIABLE: "sk-ann"}
    command = [sys.executable, "-m", "penstock", "serve", "demo", "--port", "0"]
    options = {"env": environment, "stderr": processes.PIPE, "text": True, "cwd": tmp_path}
    with processes.Process[str](command, **options) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"ready at (http://\S+)", line))).split()[-1]
        with httpx2.Client(base_url=url, headers={"authorization": "Bearer sk-ann"}, timeout=120) as http:
            assert http.get("/ready").status_code == 200
            made = http.post(
                "/v1/images/generations", json={"prompt": "a red circle", "seed": 0, "response_format": "url"}
            )
            assert made.status_code == 200, made.text
            assert http.get(made.json()["data"][0]["url"]).content.startswith(b"\x89PNG")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0

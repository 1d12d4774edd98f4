"""200 clients for a minute, by the processes of benchmarks/serve.py: all get right pictures or 429."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.thorough
def test_a_crowd_gets_right_pictures_or_429_and_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    serve: Any = importlib.import_module("serve")
    server, loop = serve.Server(tmp_path / "served"), serve.Loop()
    try:
        found = serve.crowd(server, loop, argparse.Namespace(clients=200, crowd_s=60.0))
    finally:
        loop.end()
        server.end()
    assert found["wrong"] == [] and found["statuses"]["200"] > 0 and found["statuses"]["429"] > 0
    assert found["health"]["p99_ms"] < 50, found["health"]
    assert found["memory"]["growth"] < 0.05, found["memory"]

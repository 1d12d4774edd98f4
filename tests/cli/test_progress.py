"""Bars on a terminal, silence elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from penstock.cli import progress
from penstock.cli.progress import Bars
from penstock.engine.build import LoadEvent
from penstock.request import StepEvent


def draw(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=120, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with Bars(num_items=2) as bars:
        bars.loading(LoadEvent(component="transformer", done_bytes=0, total_bytes=2 * 2**20))
        bars.loading(LoadEvent(component="", done_bytes=2 * 2**20, total_bytes=2 * 2**20))
        for item in range(2):
            for step in range(3):
                bars.step(StepEvent(item=item, stage=0, step=step, total=2, elapsed_s=0.5))
        bars.step(StepEvent(item=1, stage=1, step=1, total=0, elapsed_s=0.5))
    return stream.getvalue()


def test_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(monkeypatch, is_terminal=True)
    assert "2.0 of 2.0 MiB" in drawn
    assert "denoising 2 of 2" in drawn and "denoising 1 of 2" not in drawn.splitlines()[-1]
    assert "step 1, 0.50 s per step" in drawn


def test_silent_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(monkeypatch, is_terminal=False).strip() == ""

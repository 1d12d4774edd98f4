"""Fixtures of the engine's tests."""

from __future__ import annotations

from tests.engine.played import play

__all__ = ["play"]

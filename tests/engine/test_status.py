"""The limits of an engine."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.engine.status import EngineConfig
from penstock.errors import ConfigError


@pytest.mark.parametrize(
    "values",
    [
        {"max_queue": 0},
        {"max_queue": 1.5},
        {"max_batch_size": True},
        {"start_timeout_s": 0},
        {"step_timeout_s": -1},
        {"rank_timeout_s": 0},
    ],
)
def test_limits_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EngineConfig(**values)


def test_the_defaults_outlast_a_short_pause() -> None:
    assert EngineConfig().rank_timeout_s >= 10

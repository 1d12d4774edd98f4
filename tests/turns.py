"""What is too much for every run of the tests: it takes turns, and all of it runs where PENSTOCK_THOROUGH is set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

IS_THOROUGH = bool(os.environ.get("PENSTOCK_THOROUGH"))


def by_turns(items: Iterable[T], of: int, first: int = 0) -> list[T]:
    """Every so many of some items, beginning with one; all of them in a thorough run."""
    return [item for number, item in enumerate(items) if IS_THOROUGH or number % of == first % of]


TURNS = {
    **dict.fromkeys(("distributed/test_twin.py", "distributed/test_tiles.py"), 6),
    **dict.fromkeys(("distributed/sequence/test_blocks.py", "distributed/sequence/test_attention.py"), 6),
    **dict.fromkeys(("distributed/test_tensor.py", "distributed/hsdp/test_families.py", "test_zoo.py"), 4),
    **dict.fromkeys(("parity/test_lora.py", "parity/test_memory.py", "models/test_dtypes.py"), 4),
    **dict.fromkeys(("distributed/guidance/test_calls.py", "engine/test_sharing.py", "engine/test_splits.py"), 3),
    **dict.fromkeys(("engine/test_together_weights.py", "distributed/sequence/test_declared.py"), 3),
    **dict.fromkeys(("parity/test_offload.py", "parity/test_shards.py", "offload/test_changes.py"), 2),
    **dict.fromkeys(("parity/test_load.py", "parity/test_escapes.py", "distributed/test_stages.py"), 2),
    **dict.fromkeys(("cli/test_generate.py", "cli/test_ranks.py", "distributed/test_watch.py"), 2),
    **dict.fromkeys(("engine/test_attachments.py", "engine/test_parity.py", "engine/test_plans.py"), 2),
    **dict.fromkeys(("engine/test_engine.py", "engine/test_previews.py", "engine/test_companions.py"), 2),
    **dict.fromkeys(("distributed/hsdp/test_shards.py", "distributed/test_watch_waits.py"), 2),
    **dict.fromkeys(("distributed/patch/test_windows.py", "offload/test_gradients.py"), 2),
    **dict.fromkeys(("server/test_openapi.py", "server/test_process.py"), 2),
}
"""Of the cases of each test in a file, every so many run; each test runs with one at least. All run where thorough."""


def not_their_turn(cases: Iterable[tuple[str, str, T]]) -> list[T]:
    """The cases that are left to a thorough run.

    Args:
        cases: file below tests/, name of the test without its parameters, and the case.
    """
    numbers: Counter[tuple[str, str]] = Counter()
    left_out = []
    for file, name, case in cases:
        if not IS_THOROUGH and numbers[file, name] % TURNS.get(file, 1):
            left_out.append(case)
        numbers[file, name] += 1
    return left_out

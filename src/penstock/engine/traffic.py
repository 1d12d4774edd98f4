"""What a rank exchanged since a moment, as reports tell it."""

from __future__ import annotations

from collections import Counter

from penstock.distributed.mesh import Mesh
from penstock.report import TrafficReport

Counts = dict[str, tuple[Counter[str], Counter[str]]]
"""By axis: calls, and bytes received, by operation."""


def counted(mesh: Mesh) -> Counts:
    """What was exchanged along each axis of a mesh so far, by all pipelines that share it."""
    return {axis: (Counter(item.num_calls), Counter(item.received_bytes)) for axis, item in mesh.traffic().items()}


def traffic_since(mesh: Mesh, before: Counts) -> tuple[TrafficReport, ...]:
    """What was exchanged since `before` was counted."""
    found = []
    for axis, (calls, received) in counted(mesh).items():
        old_calls, old_received = before.get(axis, (Counter(), Counter()))
        for operation, num_calls in sorted((calls - old_calls).items()):
            num_bytes = received[operation] - old_received[operation]
            found.append(TrafficReport(axis=axis, operation=operation, num_calls=num_calls, received_bytes=num_bytes))
    return tuple(found)

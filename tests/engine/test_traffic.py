"""What was exchanged since a moment."""

from __future__ import annotations

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import Mesh
from penstock.engine.traffic import counted, traffic_since
from penstock.report import TrafficReport


def test_only_what_came_since_is_told() -> None:
    groups = {axis: Group(axis, 0, (0, 1), None) for axis in ("ring", "cfg")}
    mesh = Mesh(ParallelConfig(), None, groups)
    groups["ring"].traffic.add("shift", 10)
    before = counted(mesh)
    assert traffic_since(mesh, before) == ()
    groups["ring"].traffic.add("shift", 5)
    groups["cfg"].traffic.add("send", 0)
    assert traffic_since(mesh, before) == (
        TrafficReport(axis="ring", operation="shift", num_calls=1, received_bytes=5),
        TrafficReport(axis="cfg", operation="send", num_calls=1, received_bytes=0),
    )

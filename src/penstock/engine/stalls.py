"""How many blocks would have to stay for compute never to wait, from what was measured.

Owns r = ceil(n (1 - compute / fill)). Does not know how compute and fills are measured.
"""

from __future__ import annotations

import math

from penstock.engine.plans import Planned
from penstock.offload.streamer import Streamer
from penstock.planner.solve import budget_for
from penstock.report import ZeroStall


def zero_stalls(planned: Planned, streamer: Streamer) -> tuple[ZeroStall, ...]:
    """One entry for each component whose blocks streamed for long enough to be measured.

    With so many residents, filling hides behind compute.
    """
    found = []
    for part in planned.plan.components:
        measured = streamer.measured(part.name)
        if not part.num_streamed or measured is None:
            continue
        compute_s, fill_s = measured
        total = part.num_resident + part.num_streamed
        stay = min(max(math.ceil(total * (1 - compute_s / fill_s)), 0), total) if fill_s else 0
        found.append(
            ZeroStall(
                component=part.name,
                compute_s=compute_s,
                fill_s=fill_s,
                num_blocks=total,
                num_resident=stay,
                budget_bytes=budget_for(planned.demands, part.name, stay, planned.plan.prefetch),
            )
        )
    return tuple(found)

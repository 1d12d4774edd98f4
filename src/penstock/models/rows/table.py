"""The row of a denoiser: its own class's, or that of the nearest class above it.

Owns the lookup. Does not know what a row is used for.
"""

from __future__ import annotations

from torch import nn

from penstock.models.rows import image, video
from penstock.models.rows.row import Row

ROWS: dict[str, Row] = {**image.ROWS, **video.ROWS}


def row_of(denoiser: nn.Module) -> Row | None:
    """The row of a denoiser's class; None where there is none."""
    for owner in type(denoiser).__mro__:
        row = ROWS.get(owner.__name__)
        if row is not None:
            return row
    return None

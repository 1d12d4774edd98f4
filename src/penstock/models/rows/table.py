"""The row of a denoiser: its own class's, or that of the nearest class above it.

A class may carry its row as an attribute, `_sequence_row`; `ROWS[name] = Row(...)` adds one for a class that cannot.

Owns the lookup, and whether a row fits. Does not know what a row is used for.
"""

from __future__ import annotations

import inspect

from torch import nn

from penstock.errors import DeclarationError
from penstock.models.rows import image, video
from penstock.models.rows.row import Layout, Row, StackRow

ROWS: dict[str, Row] = {**image.ROWS, **video.ROWS}
"""By the name of the class."""


def row_of(denoiser: nn.Module) -> Row | None:
    """The row of a denoiser's class; None where there is none."""
    declared = getattr(type(denoiser), "_sequence_row", None)
    if isinstance(declared, Row):
        return declared
    for owner in type(denoiser).__mro__:
        row = ROWS.get(owner.__name__)
        if row is not None:
            return row
    return None


def blocks_of(denoiser: nn.Module, stack: StackRow) -> tuple[nn.Module, ...]:
    """The blocks of a stack, in order; none where the model was built without them.

    Raises:
        DeclarationError: for a path that the class does not have.
    """
    found: object = denoiser
    for name in stack.path.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, nn.ModuleList):
        raise DeclarationError(
            f"the row of {type(denoiser).__name__} names the stack {stack.path!r}, which is no list of blocks of it. "
            "Name the path of a ModuleList."
        )
    return tuple(found)


def check_row(denoiser: nn.Module, row: Row) -> None:
    """Whether a row's names are those of the class.

    Raises:
        DeclarationError: for a stack, an argument, a stream or an attention that is not there.
    """
    owner = type(denoiser).__name__
    is_seen = dict.fromkeys(row.attention, False)
    known: set[str] = set()
    for stack in row.stacks:
        for text in (text for layouts in stack.takes.values() for text in _texts(layouts)):
            known.update(Layout.of(text).streams)
        for block in blocks_of(denoiser, stack):
            names = inspect.signature(type(block).forward).parameters
            for name in stack.takes:
                if name not in names:
                    raise DeclarationError(
                        f"the row of {owner} says that {stack.path} take {name!r}, and {type(block).__name__}.forward "
                        f"takes {', '.join(list(names)[1:])}. Correct the row."
                    )
            for path, _ in block.named_modules():
                is_seen.update(dict.fromkeys(row.patterns_of(path), True))
    unseen = [pattern for pattern, seen in is_seen.items() if not seen]
    if unseen and any(blocks_of(denoiser, stack) for stack in row.stacks):
        raise DeclarationError(f"the row of {owner} names the attention {unseen[0]!r}, and no block has it.")
    named = {stream for seen in row.attention.values() for text in _texts(seen) for stream in Layout.of(text).streams}
    if not named <= known:
        raise DeclarationError(f"the row of {owner} has attention over {sorted(named - known)}, which no block takes.")


def _texts(layouts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (layouts,) if isinstance(layouts, str) else layouts

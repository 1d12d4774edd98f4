"""The row of a denoiser: its own class's, or that of the nearest class above it; or why there can be none.

A class may carry its row as an attribute, `_sequence_row`; `ROWS[name] = Row(...)` adds one for a class that cannot.

Owns the lookup, and whether a row fits. Does not know what a row is used for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from penstock.errors import DeclarationError
from penstock.models.rows import image, refused, sound, video
from penstock.models.rows.row import Layout, Row, StackRow

ROWS: dict[str, Row] = {**image.ROWS, **video.ROWS, **sound.ROWS}
"""By the name of the class."""


def row_of(denoiser: nn.Module) -> Row | None:
    """The row of a denoiser's class; None where there is none."""
    declared = getattr(type(denoiser), "_sequence_row", None)
    if isinstance(declared, Row):
        return declared
    for owner in type(denoiser).__mro__:
        if owner.__name__ in ROWS or owner.__name__ in refused.REFUSED:
            return ROWS.get(owner.__name__)
    return None


def strange_arguments(denoiser: nn.Module) -> tuple[str, ...]:
    """Arguments of a denoiser's forward of which its row knows nothing: the class that it is for does not take them.

    Args:
        denoiser: whose class may be below the one that the row is for.

    Returns:
        Their names, in order; none where the row is for the denoiser's own class, or there is no row.
    """
    lines = type(denoiser).__mro__
    owner: Any = next((kind for kind in lines if "_sequence_row" in vars(kind) or kind.__name__ in ROWS), None)
    row = row_of(denoiser)
    if owner is None or row is None:
        return ()
    known = {*inspect.signature(owner.forward).parameters, *row.residuals, *row.refuses}
    taken = inspect.signature(type(denoiser).forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(item.name for item in taken if item.name not in known and item.kind not in variadic)


def reason_of(denoiser: nn.Module) -> str | None:
    """Why the tokens of a denoiser's class cannot be split; None where no reason is known."""
    found = (refused.REFUSED.get(owner.__name__) for owner in type(denoiser).__mro__)
    return next(filter(None, found), None)


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


def modules_of(denoiser: nn.Module, texts: Mapping[str, str]) -> Iterator[tuple[nn.Module, str]]:
    """The modules that a row names by regular expressions over their paths, each with its text."""
    for path, module in denoiser.named_modules():
        for pattern, text in texts.items():
            if re.fullmatch(pattern, path):
                yield module, text


def check_row(denoiser: nn.Module, row: Row) -> None:
    """Whether a row's names are those of the class.

    Raises:
        DeclarationError: for a stack, an argument, a stream, an attention or an end that is not there.
    """
    owner = type(denoiser).__name__
    blocks = [(stack, block) for stack in row.stacks for block in blocks_of(denoiser, stack)]
    for stack, block in blocks:
        _check_arguments(owner, f"{stack.path} take", type(block), stack.takes)
    _check_arguments(owner, "it takes", type(denoiser), {**row.residuals, **row.refuses})
    found = {
        pattern
        for stack, block in blocks
        for path, _ in block.named_modules()
        for pattern in row.patterns_of(stack, path)
    }
    unseen = [pattern for pattern in row.attention if pattern not in found]
    if unseen and blocks:
        raise DeclarationError(f"the row of {owner} names the attention {unseen[0]!r}, and no block has it.")
    for pattern, text in {**row.ends, **row.between}.items():
        if not any(modules_of(denoiser, {pattern: text})):
            raise DeclarationError(f"the row of {owner} names the module {pattern!r}, and the class has none.")
    known = _streams(text for stack in row.stacks for layouts in stack.takes.values() for text in _texts(layouts))
    named = _streams(text for seen in row.attention.values() for text in _texts(seen))
    if not named <= known:
        raise DeclarationError(f"the row of {owner} has attention over {sorted(named - known)}, which no block takes.")


def _check_arguments(owner: str, taker: str, kind: type[nn.Module], names: Iterable[str]) -> None:
    taken = inspect.signature(kind.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name in names:
        if name not in taken and not takes_all:
            raise DeclarationError(
                f"the row of {owner} says that {taker} {name!r}, and {kind.__name__}.forward takes "
                f"{', '.join(list(taken)[1:])}. Correct the row."
            )


def _streams(texts: Iterable[str]) -> set[str]:
    return {stream for text in texts for stream in Layout.of(text).streams}


def _texts(layouts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (layouts,) if isinstance(layouts, str) else layouts

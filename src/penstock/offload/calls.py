"""Which modules' calls are on a thread's stack: for what no hook tells, as after Ctrl-C."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__


def is_running(module: nn.Module) -> bool:
    """Whether this thread is inside a module's call.

    torch runs no hook after a forward that Ctrl-C ended: its unit stays marked as in use, and nobody uses it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def is_in_call(thread: int) -> bool:
    """Whether a thread is inside the call of any module; its locals must not be looked at while it runs."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False

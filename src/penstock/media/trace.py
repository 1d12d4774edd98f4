"""A timeline as a Chrome trace, for chrome://tracing and https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from penstock.errors import OutputError
from penstock.media.files import check_place, whole_file
from penstock.timeline import Timeline

_SUFFIX = ".json"


def save_trace(timeline: Timeline, path: str | Path) -> Path:
    """Write a timeline as Chrome's trace event JSON.

    Args:
        timeline: what to write.
        path: where to, ending in .json. An existing file is replaced.

    Returns:
        The path.

    Raises:
        OutputError: for another suffix, or a place that cannot be written.

    Cost: 10 s and 140 MB for a million events. The file appears at once when it is complete; interrupted or failed,
    nothing is left behind.
    """
    target = Path(path).expanduser()
    check_trace(target)
    with whole_file(target.resolve()) as unfinished:  # a link keeps leading to its file
        unfinished.write_text(timeline.to_chrome(), "utf-8")
    return target


def check_trace(target: Path) -> None:
    """Refuse a path that `save_trace` could not write to.

    Raises:
        OutputError: naming what is wrong with it.
    """
    if target.suffix.lower() != _SUFFIX:
        raise OutputError(f"{str(target)!r}: a trace is written as {_SUFFIX}. Give a path that ends in {_SUFFIX}.")
    check_place(target)

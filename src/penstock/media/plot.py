"""A timeline as a picture: what every unit did, above the bytes that lay on the device.

Owns how it is drawn. matplotlib is imported when there is something to draw, for it is an optional extra.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.bytesize import format_bytes
from penstock.errors import ConfigError, OutputError
from penstock.media.files import check_target, whole_file
from penstock.timeline import SpanKind, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIX = ".png"
_DPI = 130
_WIDTH_IN = 12.0
_ROW_IN = 0.2
_MAX_ROWS_IN = 14.0  # more rows become thinner instead
_MIN_ROWS_IN = 1.2
_BYTES_IN = 1.8
_MARGINS_IN = 1.4  # legends and the time axis
_BINS = 4000  # about a third of a pixel: what is closer is drawn as one
_MIN_BAR_BINS = 3.5  # about a pixel: what is shorter would vanish

_TEXT_PT = 8
_LABEL_PT = 7
_LABEL_PITCH_PT = 9
_MAX_LABEL = 40
_ELLIPSIS = "..."

_KINDS: tuple[SpanKind, ...] = ("fill", "compute", "wait")
_COLOURS = {"fill": "#0072b2", "compute": "#009e73", "wait": "#d55e00"}  # Okabe and Ito, 2008: told apart by everyone
_BANDS = {"fill": (-0.4, 0.4), "compute": (-0.4, 0.8), "wait": (0.0, 0.4)}  # of a row: upper edge, height
_LIGHT = "#dcdcdc"
_DARK = "#555555"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_Bars = list[tuple[float, float]]  # begin, end in seconds


def plot_timeline(timeline: Timeline, path: str | Path, *, promised_bytes: int | None = None) -> Path:
    """Draw a timeline as a PNG.

    Above, one row per unit in the order of their first appearance: when it lay on the device, when it was filled (upper
    half of its row), when compute waited for it (lower half), and when it computed. Below, the bytes on the device.
    Bars less than a third of a pixel apart are drawn as one, and none is thinner than a pixel: a long run shows where
    things happen, its legend how long they took, and `save_trace` every detail.

    Args:
        timeline: what to draw.
        path: where to, ending in .png. An existing file is replaced.
        promised_bytes: drawn as a dashed line.

    Returns:
        The path.

    Raises:
        ConfigError: without matplotlib.
        OutputError: for another suffix, or a place that cannot be written.

    Cost: a second, and several more for hundreds of thousands of events. The file appears at once when it is complete;
    interrupted or failed, nothing is left behind.
    """
    target = Path(path).expanduser()
    check_plot(target)
    figure = _figure(timeline, promised_bytes)
    with whole_file(target.resolve()) as unfinished:  # a link keeps leading to its file
        figure.savefig(unfinished, format="png", dpi=_DPI)
    return target


def check_plot(path: Path) -> None:
    """Refuse before the work begins what could not be drawn when it is done.

    Raises:
        ConfigError: without matplotlib.
        OutputError: naming what is wrong with the path.
    """
    if path.suffix.lower() != _SUFFIX:
        raise OutputError(f"{str(path)!r}: a plot is written as {_SUFFIX}. Give a path that ends in {_SUFFIX}.")
    check_target(path, "image")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{path} needs matplotlib to be drawn: {error}. Try: pip install 'penstock[plot]'") from error


def _figure(timeline: Timeline, promised_bytes: int | None) -> Figure:
    from matplotlib.figure import Figure

    first_s, last_s = timeline.first_s, timeline.last_s
    last_s = max(last_s, first_s + 1e-6)
    units = _units(timeline)
    rows_in = min(max(len(units) * _ROW_IN, _MIN_ROWS_IN), _MAX_ROWS_IN)
    figure = Figure(figsize=(_WIDTH_IN, rows_in + _BYTES_IN + _MARGINS_IN), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(rows_in, _BYTES_IN))
    _draw_units(above, timeline, units, (first_s, last_s))
    _label_rows(above, units, rows_in)
    _draw_bytes(below, timeline, promised_bytes, (first_s, last_s))
    below.set_xlim(first_s - timeline.begin_s, last_s - timeline.begin_s)
    below.set_xlabel("seconds", fontsize=_TEXT_PT)
    if timeline.dropped:
        figure.suptitle(f"The record was full: {timeline.dropped:,} later events are missing.", fontsize=_TEXT_PT)
    return figure


def _units(timeline: Timeline) -> list[str]:
    """Names of all units, in the order of their first appearance."""
    seen = [(residence.begin_s, residence.unit) for residence in timeline.residences]
    seen += [(span.begin_s, span.unit) for span in timeline.spans]
    return list(dict.fromkeys(unit for _, unit in sorted(seen, key=lambda pair: pair[0])))


def _draw_units(axes: Axes, timeline: Timeline, units: list[str], extent_s: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    rows = {unit: row for row, unit in enumerate(units)}
    gap_s = (extent_s[1] - extent_s[0]) / _BINS
    begin_s = timeline.begin_s

    def draw(bars: Iterable[tuple[str, float, float]], band: tuple[float, float], colour: str) -> None:
        by_unit: dict[str, _Bars] = {}
        for unit, bar_begin_s, bar_end_s in bars:
            by_unit.setdefault(unit, []).append((bar_begin_s - begin_s, bar_end_s - begin_s))
        for unit in rows.keys() & by_unit.keys():  # others appeared while this was drawn
            merged = _merged(by_unit[unit], gap_s)
            ranges = [(start, max(end - start, gap_s * _MIN_BAR_BINS)) for start, end in merged]
            axes.broken_barh(ranges, (rows[unit] + band[0], band[1]), facecolor=colour, linewidth=0)

    stays = [(stay.unit, stay.begin_s, stay.end_s) for stay in timeline.residences]
    draw(((unit, start, extent_s[1] if end is None else end) for unit, start, end in stays), (-0.45, 0.9), _LIGHT)
    patches = [Patch(color=_LIGHT, label="on the device")]
    spans = timeline.spans
    for kind in _KINDS:
        bars = ((span.unit, span.begin_s, span.end_s) for span in spans if span.kind == kind)
        draw(bars, _BANDS[kind], _COLOURS[kind])
        patches.append(Patch(color=_COLOURS[kind], label=f"{kind} {timeline.seconds(kind):,.3f} s"))
    axes.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        fontsize=_TEXT_PT,
        borderaxespad=0.2,
    )


def _label_rows(axes: Axes, units: list[str], rows_in: float) -> None:
    """Names at the rows, as many as there is room for."""
    every = max(math.ceil(_LABEL_PITCH_PT / (rows_in * 72 / max(len(units), 1))), 1)
    axes.set_yticks(range(0, len(units), every), labels=[_label(unit) for unit in units[::every]], fontsize=_LABEL_PT)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)  # a name may hold a dollar
    axes.set_ylim(max(len(units), 1) - 0.5, -0.5)
    axes.tick_params(length=2, colors=_DARK)


def _label(unit: str) -> str:
    """A name as ASCII, which every font has, cut in its middle: the end tells the blocks of a stack apart."""
    name = unit.encode("ascii", "backslashreplace").decode("ascii")
    if len(name) <= _MAX_LABEL:
        return name
    tail = (_MAX_LABEL - len(_ELLIPSIS)) * 2 // 3
    return name[: _MAX_LABEL - len(_ELLIPSIS) - tail] + _ELLIPSIS + name[-tail:]


def _draw_bytes(axes: Axes, timeline: Timeline, promised_bytes: int | None, extent_s: tuple[float, float]) -> None:
    steps = timeline.device_bytes()
    peak_bytes = max(num_bytes for _, num_bytes in steps)
    steps = _thinned([*steps, (extent_s[1], steps[-1][1])], (extent_s[1] - extent_s[0]) / _BINS)
    most_bytes = max(peak_bytes, promised_bytes or 0, 1)
    power = min((most_bytes.bit_length() - 1) // 10, len(_UNITS) - 1)
    scale, unit = 1024**power, _UNITS[power]
    times = [at_s - timeline.begin_s for at_s, _ in steps]
    heights = [num_bytes / scale for _, num_bytes in steps]
    axes.fill_between(times, heights, step="post", color=_LIGHT, linewidth=0)
    axes.step(times, heights, where="post", color=_DARK, linewidth=1, label=f"peak {format_bytes(peak_bytes)}")
    if promised_bytes is not None:
        label = f"promised {format_bytes(promised_bytes)}"
        axes.axhline(promised_bytes / scale, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, most_bytes / scale * 1.1)
    axes.set_ylabel(f"on the device, {unit}", fontsize=_TEXT_PT)
    axes.tick_params(length=2, colors=_DARK, labelsize=_TEXT_PT)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=_TEXT_PT, borderaxespad=0.2)


def _merged(bars: _Bars, gap_s: float) -> _Bars:
    """Bars by time, those that are no more than a gap apart made one: what no eye could tell apart costs nothing."""
    merged: _Bars = []
    for begin_s, end_s in sorted(bars):
        if merged and begin_s - merged[-1][1] <= gap_s:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((begin_s, end_s))
    return merged


def _thinned(steps: list[tuple[float, int]], bin_s: float) -> list[tuple[float, int]]:
    """Highest and last of the steps within each bin: no peak is lost, and a slot that changes hands makes no dip."""
    kept: list[tuple[float, int]] = []
    for _, group in groupby(steps, key=lambda step: (step[0] - steps[0][0]) // bin_s):
        points = list(group)
        highest = max(reversed(points), key=lambda point: point[1])
        kept += [highest] if highest is points[-1] else [highest, points[-1]]
    return kept

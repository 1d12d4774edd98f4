"""A timeline becomes a picture that stays readable, whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penstock.errors import ConfigError, OutputError
from penstock.media import plot
from penstock.media.plot import check_plot, plot_timeline
from penstock.timeline import Timeline
from tests import processes
from tests.media.timelines import MIB, streamed


def colours_in(path: Path) -> set[str]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels, axis=0)}


def test_every_kind_is_drawn(tmp_path: Path) -> None:
    path = plot_timeline(streamed(), tmp_path / "run.png", promised_bytes=400 * MIB)
    assert {*plot._COLOURS.values(), plot._LIGHT} <= colours_in(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_rows_bytes_and_promise() -> None:
    timeline = streamed(num_encoder=4, num_blocks=12)
    above, below = plot._figure(timeline, 400 * MIB).axes
    labels = [text.get_text() for text in above.get_yticklabels()]
    blocks = [f"transformer.transformer_blocks.{index}" for index in range(12)]
    assert labels == [*(f"text_encoder.encoder.block.{index}" for index in range(4)), *blocks, "vae.decoder"]
    assert above.get_shared_x_axes().joined(above, below)
    legend = [text.get_text() for text in below.get_legend().get_texts()]
    assert legend == ["peak 346 MiB", "promised 400 MiB"]
    steps, promise = below.get_lines()
    assert max(steps.get_ydata()) == timeline.peak_bytes / MIB
    assert list(promise.get_ydata()) == [400, 400]


def test_what_is_shorter_than_a_pixel_is_seen(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add("wait", "a", timeline.begin_s + 1, timeline.begin_s + 1 + 1e-5)
    timeline.add("compute", "a", timeline.begin_s, timeline.begin_s + 0.5)
    timeline.add("compute", "b", timeline.begin_s + 5, timeline.begin_s + 60)
    path = plot_timeline(timeline, tmp_path / "run.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))[60:]  # below the legend
    wait = tuple(bytes.fromhex(plot._COLOURS["wait"][1:]))
    assert (pixels == wait).all(axis=-1).any()


@pytest.mark.parametrize("num_encoder", [36, 400])
def test_many_units_stay_readable(num_encoder: int) -> None:
    figure = plot._figure(streamed(num_encoder, 57, 2, 20), None)
    assert figure.get_size_inches()[1] < 18
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) * plot._LABEL_PITCH_PT <= plot._MAX_ROWS_IN * 72
    assert all(len(text.get_text()) <= plot._MAX_LABEL for text in labels)


def test_names_are_cut_in_their_middle() -> None:
    cut = plot._label("model.diffusion.very_long_component_name.single_transformer_blocks.37")
    assert len(cut) == plot._MAX_LABEL
    assert cut.startswith("model.") and "..." in cut and cut.endswith("transformer_blocks.37")
    assert plot._label("vae.decoder") == "vae.decoder"


def test_names_in_any_script_are_drawn(tmp_path: Path) -> None:
    timeline = Timeline()
    for unit in ("\u7ea2", "$x$ $", "", "_hidden", "two\nlines"):
        timeline.add("compute", unit, timeline.begin_s, timeline.begin_s + 1)
    assert plot_timeline(timeline, tmp_path / "run.png").exists()


def test_empty_timeline_is_drawn(tmp_path: Path) -> None:
    assert plot_timeline(Timeline(), tmp_path / "run.png", promised_bytes=0).exists()


def test_units_that_are_still_there_are_drawn_to_the_end() -> None:
    timeline = Timeline()
    timeline.entered("a", 10, timeline.begin_s)
    timeline.add("compute", "b", timeline.begin_s, timeline.begin_s + 8)
    (stay, *_) = plot._figure(timeline, None).axes[0].collections
    assert stay.get_paths()[0].get_extents().x1 == pytest.approx(8)


def test_full_record_says_so() -> None:
    timeline = Timeline(max_events=1)
    for index in range(3):
        timeline.add("compute", "a", timeline.begin_s + index, timeline.begin_s + index + 1)
    title = plot._figure(timeline, None).get_suptitle()
    assert "2 later events are missing" in title


def test_bars_that_touch_become_one() -> None:
    assert plot._merged([(2.0, 3.0), (0.0, 1.0), (1.05, 1.5), (0.2, 0.4)], gap_s=0.1) == [(0.0, 1.5), (2.0, 3.0)]


def test_thinning_loses_no_peak_and_draws_no_dip_where_a_slot_changes_hands() -> None:
    steps = [(0.0, 5), (1.0, 0), (1.0, 5), (2.0, 9), (2.0, 5), (3.0, 1)]
    assert plot._thinned(steps, 0.5) == [(0.0, 5), (1.0, 5), (2.0, 9), (2.0, 5), (3.0, 1)]
    assert max(plot._thinned(steps, 10.0)) == (3.0, 1)
    assert (2.0, 9) in plot._thinned(steps, 10.0)


def test_interrupted_plot_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "run.png"
    path.write_text("old")

    def half(self: Figure, target: Path, **options: object) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        plot_timeline(streamed(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run.svg", "a plot is written as .png"),
        ("missing/run.png", "is no folder"),
        ("taken.png", "is a folder"),
        (".", "ends in .png"),
    ],
)
def test_paths_that_cannot_work(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OutputError, match=message):
        check_plot(tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[plot\]'"):
        plot_timeline(streamed(), tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_when_there_is_something_to_draw_and_no_window_is_opened(tmp_path: Path) -> None:
    code = (
        "import sys, penstock.media.plot as plot, penstock.timeline as t; assert 'matplotlib' not in sys.modules;"
        f"plot.plot_timeline(t.Timeline(), {str(tmp_path / 'a.png')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    processes.run([sys.executable, "-c", code], check=True)

"""`penstock generate`: from a prompt to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.interrupts import interruptible
from penstock.cli.options import RequestOptions, command
from penstock.cli.ranks import Place, check_replicas, take_place
from penstock.config import LoadConfig, ParallelConfig, option
from penstock.errors import ConfigError
from penstock.request import GenerationRequest, StepEvent

if TYPE_CHECKING:
    from penstock.engine.build import Prepared

_STEM = "out"


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """What to draw of a run beside its result."""

    trace: Path | None = option(  # noqa: RUF009 -- a field
        None, "Write fills, waits and compute as a Chrome trace, .json.", "FILE"
    )
    plot: Path | None = option(None, "Draw what is on the device and when, .png.", "FILE")  # noqa: RUF009


@command
def generate(
    model: Annotated[str, typer.Argument(help="demo, demo-video, a folder saved by diffusers, or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; out.png, .mp4 or .wav.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,
    request: RequestOptions,
    drawings: DrawingOptions,
    load: LoadConfig,
    parallel: ParallelConfig,
) -> None:
    """Make a picture, a video or a sound, and write it to a file."""
    asked = request.request(prompt)
    check_replicas(parallel, asked.num_images)
    place = take_place(parallel)
    from penstock.engine.build import prepare
    from penstock.engine.description import effective

    begun_s = time.perf_counter()
    with place.joined(load):
        prepared = prepare(model, load, parallel)
        target = check(prepared, asked, out)
        check_drawings(prepared, drawings.trace, drawings.plot)
        story = Story(effective(prepared), notes_on(prepared, asked))
        make(prepared, asked, target, drawings, place, story, begun_s, as_json)
        if place.speaks and not as_json:
            for note in story.notes:
                typer.echo(f"note: {note}", err=True)


def make(
    prepared: Prepared,
    asked: GenerationRequest,
    target: Path,
    drawings: DrawingOptions,
    place: Place,
    story: Story,
    begun_s: float,
    as_json: bool,
) -> None:
    """Load, make the pictures of this rank's replica, write them, and tell of those of all."""
    from penstock.cli.progress import Bars
    from penstock.engine.build import fill
    from penstock.engine.description import effective
    from penstock.engine.generate import generate as run
    from penstock.media.files import save

    trace, plot = drawings.trace, drawings.plot
    try:
        with Bars(asked.num_images, is_silent=not place.speaks) as bars, interruptible() as check_interrupt:
            pipeline = fill(prepared, bars.loading, trace=place.speaks and bool(trace or plot))
            story.facts["load_s"] = round(time.perf_counter() - begun_s, 3)
            show = bars.print if place.speaks and not as_json else None

            def on_step(event: StepEvent) -> None:
                check_interrupt()
                bars.step(event)

            results = run(pipeline, asked, on_step=on_step)
            for item, result in zip(place.items(asked.num_images), results, strict=True):
                if place.writes:
                    path = save(result, story.path_of(result, target, item, asked.num_images), effective(prepared))
                    story.add(item, entry_of(path, result), show)
            story.gather(place, show)
            if place.speaks:
                draw(pipeline, trace, plot, story)
    finally:
        if as_json and place.speaks and story.outputs:
            typer.echo(story.to_json(is_complete=len(story.outputs) == asked.num_images))


class Story:
    """What a run has made so far, for people line by line, or for machines at the end.

    Attributes:
        facts: the effective configuration and what was measured.
        notes: what the user should know.
        outputs: one entry per finished file, by its index among all.
    """

    def __init__(self, facts: dict[str, Any], notes: list[str]) -> None:
        self.facts = facts
        self.notes = notes
        self.outputs: dict[int, dict[str, Any]] = {}

    def path_of(self, result: Any, target: Path, item: int, count: int) -> Path:
        """Where a result goes: with the suffix of what was really made, noted where that is another than expected."""
        from penstock.media.files import SUFFIXES, numbered, suffixes

        path = numbered(target, item, count)
        if path.suffix.lower() in suffixes(result.kind):
            return path
        self.notes.append(
            f"the pipeline made a {result.kind}, so {path.name} became {path.stem}{SUFFIXES[result.kind]}"
        )
        return path.with_suffix(SUFFIXES[result.kind])

    def add(self, item: int, entry: dict[str, Any], show: Callable[[str], None] | None) -> None:
        """Enter a finished file, and show its line."""
        self.outputs[item] = entry
        if show is not None:
            show(f"{entry['path']}  {entry['description']}  seed {entry['seed']}  {entry['elapsed_s']} s")

    def gather(self, place: Place, show: Callable[[str], None] | None) -> None:
        """Enter what the other replicas have made, where there are any; all ranks must call this."""
        if place.num_replicas == 1:
            return
        for outputs, notes in place.gather((self.outputs, self.notes), tuple[dict[int, dict[str, Any]], list[str]]):
            for item in sorted(outputs.keys() - self.outputs.keys()):
                self.add(item, outputs[item], show)
            self.notes.extend(note for note in notes if note not in self.notes)

    def to_json(self, is_complete: bool) -> str:
        """All of it in one line."""
        outputs = [self.outputs[item] for item in sorted(self.outputs)]
        return json.dumps({"outputs": outputs, "complete": is_complete, "notes": self.notes, **self.facts})


def check(prepared: Prepared, asked: GenerationRequest, out: Path | None) -> Path:
    """Refuse before any weights are read what cannot work; say where the result will go.

    Raises:
        UsageError: for arguments, sizes and paths that do not fit the pipeline.
    """
    from penstock.engine.arguments import call_arguments
    from penstock.media.files import SUFFIXES, check_target, numbered
    from penstock.models.sizes import output_kind

    skeleton = prepared.skeleton.pipeline
    kind = output_kind(type(skeleton))
    call_arguments(asked, skeleton, prepared.notes.defaults)
    target = (out or Path(_STEM + SUFFIXES[kind])).expanduser()
    check_target(numbered(target, asked.num_images - 1, asked.num_images), kind)
    return target


def check_drawings(prepared: Prepared, trace: Path | None, plot: Path | None) -> None:
    """Refuse a trace or plot that could not be written later, or would show nothing.

    Raises:
        UsageError: saying why.
    """
    from penstock.media.plot import check_plot
    from penstock.media.trace import check_trace

    if (trace or plot) and prepared.plan.offload == "none":
        raise ConfigError(
            f"--trace and --plot show what streams, and here nothing does ({prepared.plan.reason}). "
            "Add --offload layerwise or sequential."
        )
    if trace is not None:
        check_trace(trace.expanduser())
    if plot is not None:
        check_plot(plot.expanduser())


def draw(pipeline: Any, trace: Path | None, plot: Path | None, story: Story) -> None:
    """Report what was streamed; write the trace and the plot where they are asked for."""
    from penstock.engine.placed import placed_on
    from penstock.media.plot import plot_timeline
    from penstock.media.trace import save_trace

    placed = placed_on(pipeline)
    if placed is None:
        return
    report = placed.report()
    story.facts["placement"] = report.summary()
    story.notes.extend(report.notes)
    if placed.plan.offload != "none":
        story.notes.extend(str(report).splitlines()[:2])
    if placed.timeline is None:
        return
    if trace is not None:
        save_trace(placed.timeline, trace)
    if plot is not None:
        plot_timeline(placed.timeline, plot, promised_bytes=placed.plan.promised_bytes)


def notes_on(prepared: Prepared, asked: GenerationRequest) -> list[str]:
    """What to tell the user of the model's files, of arguments without effect, of a prompt the model cannot know."""
    from penstock.engine.checks import effect_notes

    notes = [*prepared.skeleton.notes, *effect_notes(prepared.skeleton.pipeline, asked.arguments)]
    grammar = prepared.notes.prompts
    prompt = asked.prompt if asked.prompt is not None else asked.arguments.get("prompt")
    if grammar is not None and isinstance(prompt, str) and not grammar.knows(prompt):
        model = prepared.skeleton.folder.model
        notes.append(f"{model} was trained for prompts like: {grammar.description}. Yours is another.")
    return notes


def entry_of(path: Path, result: Any) -> dict[str, Any]:
    """What to tell of a finished file."""
    entry: dict[str, Any] = {"path": str(path), "kind": result.kind, "seed": result.seed}
    words = []
    if result.images:
        entry["width"], entry["height"] = result.images[0].size
        words.append(f"{entry['width']}x{entry['height']}")
    if result.kind == "video":
        entry["num_frames"], entry["frame_rate"] = len(result.images), result.frame_rate
        words.append(f"{entry['num_frames']} frames at {entry['frame_rate']:g} fps")
    if result.audio is not None:
        entry["sampling_rate_hz"] = result.sampling_rate_hz
        words.append(f"sound at {result.sampling_rate_hz} Hz")
    entry["arguments"] = result.arguments
    entry["elapsed_s"] = round(result.elapsed_s, 3)
    return {**entry, "description": ", ".join(words)}

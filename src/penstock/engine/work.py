"""What a rank does with an order: it calls the pipeline, tells of each step, writes the files, and says how it ended.

Owns the stages of an order and its end: done, cancelled, failed, out of memory; the next one works in any case. Does
not know processes or sockets.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from penstock.distributed.group import Group
from penstock.engine.adapters import Adapters
from penstock.engine.arguments import call_arguments, shown_arguments
from penstock.engine.build import Prepared
from penstock.engine.description import effective
from penstock.engine.generate import call, generate
from penstock.engine.latents import require_finite, seen_latents
from penstock.engine.outputs import read_outputs
from penstock.engine.previews import Previews, can_preview, preview_steps
from penstock.engine.steps import step_events
from penstock.errors import CancelledError, GenerationError, OutputError, PenstockError, RequestError
from penstock.media.files import MEDIA_TYPES, SUFFIXES, save
from penstock.media.pictures import write_spritesheet, write_thumbnail
from penstock.models.components import discover
from penstock.models.sizes import frame_rate
from penstock.offload.timing import Clock, HostClock, clock_of
from penstock.request import GenerationResult, StepEvent
from penstock.wire import Ended, Failure, FromRank, Made, MadeFile, Order, Partial, Stage, Step, Timings

_OUT_OF_MEMORY = "can't allocate memory"
_CANCELLED = "The request was cancelled."


class Line(Protocol):
    """What a worker needs of its line to the engine: the ids of orders that are to end, and to be heard."""

    cancelled: set[str]
    is_closed: bool

    def say(self, message: FromRank) -> None:
        """Send a message to the engine."""
        ...


class Worker:
    """A rank that carries out orders, one run after the other.

    Args:
        pipeline: the stock pipeline, placed.
        prepared: what it was made from.
        line: to the engine.
    """

    def __init__(self, pipeline: Any, prepared: Prepared, line: Line) -> None:
        self._pipeline = pipeline
        self._prepared = prepared
        self._line = line
        self._world: Group = prepared.mesh["world"]
        self._adapters = Adapters(pipeline)

    @property
    def _writes(self) -> bool:
        """Whether this rank tells and writes for all of its group."""
        return self._world.rank == 0

    def run(self, orders: tuple[Order, ...]) -> None:
        """Carry out one order, or several as one batch; whatever happens, each is told to have ended.

        Where a batch fails, each of its orders that is not made yet runs by itself: one may be to blame, or their
        number.
        """
        clock = clock_of(self._prepared.device)
        course = _Course(orders, self._line.say if self._writes else lambda message: None, clock)
        failure = self._failure_of(orders, course)
        if len(orders) > 1 and failure is not None and failure.code != "cancelled":
            for order in orders:
                if order.id not in course.made:
                    self.run((order,))
            orders, failure = tuple(order for order in orders if order.id in course.made), None
        if self._writes or failure is not None:
            timings = course.timings()
            for order in orders:
                self._line.say(Ended(id=order.id, timings=timings, failure=failure))

    def _failure_of(self, orders: tuple[Order, ...], course: _Course) -> Failure | None:
        """Make what is ordered; why that failed, where it did."""
        failure = None
        try:
            with self._attending(orders, course):
                self._adapters.use(orders[0].loras)
                if len(orders) == 1:
                    self._make(orders[0], course)
                else:
                    self._make_batch(orders, course)
        except Exception as error:  # a pipeline's, a writer's, a library's: the rank lives, and the next order works
            if self._is_alone_with(error):
                raise
            failure = _failure(error)
            if failure.code == "generation_failed":
                print(f"order {orders[0].id}: {error}", file=sys.stderr, flush=True)
        if failure is not None:
            gc.collect()  # what the failed call still holds; its traceback is gone by now
            torch.cuda.empty_cache()  # nothing where there is no CUDA
        return failure

    def _is_alone_with(self, error: Exception) -> bool:
        """Whether other ranks still wait for this one, which failed where they do not: its end is theirs then."""
        return self._world.size > 1 and (isinstance(error, OutputError) or not isinstance(error, PenstockError))

    def _make(self, order: Order, course: _Course) -> None:
        """Make the pictures of an order, one after the other."""
        previews = self._previews(order)
        wanted: tuple[int, ...] = ()
        num_shown = 0

        def on_step(event: StepEvent) -> None:
            nonlocal previews, wanted, num_shown
            course.step(event)
            self._check(order.id)
            if event.step == 0:
                num_shown, wanted = 0, preview_steps(order.num_partials, event.total)
            if previews is not None and event.step in wanted and previews.latents is not None:
                previews = self._show(order, previews, event.item, num_shown, course)
                num_shown += 1

        with previews.seeing() if previews is not None else nullcontext():
            course.begin(0)
            for item, result in enumerate(generate(self._pipeline, order.request, on_step=on_step)):
                course.enter("save")
                if self._writes:
                    self._line.say(Made(id=order.id, file=self._save(order, result, item)))
                self._check(order.id)
                if item + 1 < order.request.num_images:
                    course.begin(item + 1)
        course.leave()

    def _make_batch(self, orders: tuple[Order, ...], course: _Course) -> None:
        """Make one picture for each of several orders by one call."""
        first = orders[0].request
        arguments = call_arguments(first, self._pipeline, self._prepared.notes.defaults)
        shown = shown_arguments(arguments)
        arguments["prompt"] = [order.request.prompt for order in orders]
        if first.negative_prompt is not None:
            arguments["negative_prompt"] = [order.request.negative_prompt for order in orders]
        seeds = [order.request.seed or 0 for order in orders]

        def on_step(event: StepEvent) -> None:
            course.step(event)
            self._check(*(order.id for order in orders))

        course.begin(0)
        with step_events(self._pipeline, 0, on_step), seen_latents(self._pipeline, require_finite):
            outputs = read_outputs(self._pipeline, call(self._pipeline, arguments, seeds), len(orders))
        course.enter("save")
        for order, output in zip(orders, outputs, strict=True) if self._writes else ():
            result = GenerationResult(
                kind=output.kind,
                seed=order.request.seed or 0,
                images=output.images,
                audio=output.audio,
                sampling_rate_hz=output.sampling_rate_hz,
                frame_rate=frame_rate(self._pipeline, arguments) if output.kind == "video" else None,
                arguments={**shown, "prompt": order.request.prompt, "negative_prompt": order.request.negative_prompt},
                elapsed_s=course.elapsed_s,
            )
            self._line.say(Made(id=order.id, file=self._save(order, result, 0)))
            course.made.add(order.id)
        course.leave()

    @contextmanager
    def _attending(self, orders: tuple[Order, ...], course: _Course) -> Iterator[None]:
        """Inside, a wish to end is heeded beside the steps as well, and decoding is a stage.

        On one rank it is heeded whenever a component begins to run. Several ranks must end at the same place: they
        agree at each step, and before they decode.
        """
        ids = tuple(order.id for order in orders)

        def see(latents: Any) -> None:
            course.enter("decode")
            self._check(*ids)

        handles = []
        if self._world.size == 1:
            components = discover(self._pipeline)
            for component in (*components.by_role("encoder"), *components.by_role("denoiser")):
                handles.append(component.module.register_forward_pre_hook(lambda *_: self._check(*ids)))
        try:
            with seen_latents(self._pipeline, see):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, *ids: str) -> None:
        """End here, on all ranks, what is not wanted any more; a batch once nobody wants any of it.

        Raises:
            CancelledError: then.
        """
        is_unwanted = self._line.is_closed or self._line.cancelled.issuperset(ids)
        if self._world.size > 1:
            is_unwanted = bool(self._world.broadcast(torch.tensor([is_unwanted]), 0))
        if is_unwanted:
            raise CancelledError(_CANCELLED)

    def _previews(self, order: Order) -> Previews | None:
        """What makes pictures of an order's unfinished latents; None where none are wanted or can be made."""
        if not order.num_partials or not can_preview(self._pipeline):
            return None
        return Previews(self._pipeline, call_arguments(order.request, self._pipeline, self._prepared.notes.defaults))

    def _show(self, order: Order, previews: Previews, item: int, index: int, course: _Course) -> Previews | None:
        """Write and tell of one picture of unfinished latents; None where that is not possible here."""
        try:
            with course.aside():
                picture = previews.picture()
        except CancelledError:
            raise
        except GenerationError as error:
            print(f"order {order.id}: no pictures of unfinished latents: {error}", file=sys.stderr, flush=True)
            return None
        if self._writes:
            result = GenerationResult(kind="image", seed=0, images=[picture], arguments={}, elapsed_s=0.0)
            path = self._path(order, result, f"partial-{item}-{index}")
            save(result, path, quality=order.format.quality)
            self._line.say(Partial(id=order.id, item=item, index=index, path=str(path)))
        return previews

    def _save(self, order: Order, result: GenerationResult, item: int) -> MadeFile:
        """Write a result, and the small pictures of a video."""
        path = save(
            result, self._path(order, result, f"result-{item}"), effective(self._prepared), quality=order.format.quality
        )
        thumbnail = spritesheet = ""
        if result.kind == "video":
            thumbnail, spritesheet = (str(path.with_name(f"{name}-{item}.webp")) for name in ("thumbnail", "sheet"))
            write_thumbnail(result.images, Path(thumbnail))
            write_spritesheet(result.images, Path(spritesheet))
        width, height = result.images[0].size if result.images else (None, None)
        return MadeFile(
            item=item,
            path=str(path),
            kind=result.kind,
            media_type=MEDIA_TYPES[path.suffix],
            num_bytes=path.stat().st_size,
            seed=result.seed,
            width=width,
            height=height,
            num_frames=len(result.images) if result.kind == "video" else None,
            frame_rate=result.frame_rate,
            sampling_rate_hz=result.sampling_rate_hz,
            thumbnail=thumbnail,
            spritesheet=spritesheet,
            arguments=dict(result.arguments),
            elapsed_s=result.elapsed_s,
        )

    def _path(self, order: Order, result: GenerationResult, stem: str) -> Path:
        suffix = f".{order.format.name}" if order.format.name else SUFFIXES[result.kind]
        return Path(order.folder) / (stem + suffix)


class _Course:
    """The stages of a run: tells when one begins, and how long each took.

    Args:
        orders: that run.
        say: tells; does nothing on ranks that do not.
        clock: of the device, which may be far behind the host: what it is launched with is timed there.

    Attributes:
        made: ids of the orders of a batch whose pictures are written.
    """

    def __init__(self, orders: tuple[Order, ...], say: Callable[[FromRank], None], clock: Clock | None = None) -> None:
        self._clock = clock or HostClock()
        self._ids = [order.id for order in orders]
        self._say = say
        self._item = 0
        self._stage = ""
        self._begun_s = time.perf_counter()
        self._since = self._clock.mark()
        self._seconds: dict[str, float] = {}
        self._num_steps = 0
        self._is_aside = False
        self.made: set[str] = set()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run was begun."""
        return time.perf_counter() - self._begun_s

    def begin(self, item: int) -> None:
        """The next picture."""
        self._item = item
        self.enter("encode")

    def enter(self, stage: str) -> None:
        """Another stage begins; nothing where it is the same."""
        if (stage == self._stage and stage != "encode") or self._is_aside:
            return
        self.leave()
        self._stage = stage
        for order_id in self._ids:
            self._say(Stage(id=order_id, item=self._item, name=stage))

    def leave(self) -> None:
        """Count the seconds of the stage that ends."""
        now, stage = self._clock.mark(), self._stage

        def tell(begin_s: float, end_s: float) -> None:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + end_s - begin_s

        if stage:
            self._clock.between(self._since, now, tell)
        self._since, self._stage = now, ""

    def step(self, event: StepEvent) -> None:
        """A step of the pipeline's bar is done; at 0 it begins."""
        self.enter("denoise")
        self._num_steps += bool(event.step)
        for order_id in self._ids:
            self._say(Step(id=order_id, event=event))
        if event.total and event.step >= event.total:
            self.enter("decode")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, what runs is no stage of its own."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def timings(self) -> Timings:
        """Seconds of each stage so far."""
        self.leave()
        self._clock.settle()
        return Timings(num_steps=self._num_steps, **{f"{name}_s": seconds for name, seconds in self._seconds.items()})


def _failure(error: Exception) -> Failure:
    """What the user is told of an error, and by which code a program knows it."""
    if isinstance(error, CancelledError):
        return Failure(code="cancelled", message=str(error))
    if isinstance(error, RequestError):
        return Failure(code="request_invalid", message=str(error), param=error.param)
    text = str(error) if isinstance(error, PenstockError) else f"{type(error).__name__}: {error}"
    cause = error.__cause__ if isinstance(error, PenstockError) else error
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or _OUT_OF_MEMORY in str(cause):
        return Failure(
            code="out_of_memory",
            message=f"{text.rstrip('.')}: there was not enough memory. Ask for a smaller size or fewer frames.",
        )
    return Failure(code="generation_failed", message=text)

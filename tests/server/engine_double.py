"""An engine without ranks: a thread that makes small real files, fails and dies as it is told to.

It follows the contract of `penstock.engine.engine.Engine` as far as a server uses it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import Queue
from typing import Any

from PIL import Image

from penstock.engine.status import EngineStatus, GroupStatus, RankStatus
from penstock.errors import NotReadyError, QueueFullError
from penstock.media.pictures import write_jpeg, write_spritesheet, write_thumbnail, write_webp
from penstock.media.png import write_png
from penstock.media.video import write_video
from penstock.request import GenerationRequest, GenerationResult, StepEvent
from penstock.wire import (
    Began,
    Checked,
    Ended,
    Failure,
    Made,
    MadeFile,
    Order,
    OrderEvent,
    Partial,
    Stage,
    Step,
    Timings,
)

Listener = Callable[[OrderEvent], None]

SIDE = 64
MULTIPLE = 8
STEPS = 4
RATE = 8.0
FRAMES = 5
_COLOURS = ["red", "green", "blue", "yellow"]
_TEXT = {"type": "string"}
_TEXT_OR_NONE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_WHOLE = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}


def _parameter(kind: dict[str, Any], default: Any = None, is_picture: bool = False, is_required: bool = False) -> Any:
    return {"type": kind, "default": default, "is_picture": is_picture, "is_required": is_required}


def described(kind: str = "image", *, accepts_image: bool = False) -> dict[str, Any]:
    """What a pipeline of that kind says of itself."""
    parameters = {
        "prompt": _parameter(_TEXT, is_required=not accepts_image),
        "negative_prompt": _parameter(_TEXT_OR_NONE),
        "width": _parameter(_WHOLE),
        "height": _parameter(_WHOLE),
        "num_inference_steps": _parameter({"type": "integer"}, STEPS),
        "guidance_scale": _parameter({"type": "number"}, 3.5),
    }
    if kind == "video":
        parameters["num_frames"] = _parameter({"type": "integer"}, FRAMES)
    if accepts_image:
        parameters["image"] = _parameter({}, is_picture=True)
        parameters["mask_image"] = _parameter({}, is_picture=True)
        parameters["strength"] = _parameter({"type": "number"}, 0.8)
    is_video = kind == "video"
    return {
        "model": "double",
        "pipeline": "DoublePipeline",
        "kind": kind,
        "parameters": parameters,
        "accepts_image": accepts_image,
        "accepts_mask": "mask_image" if accepts_image else None,
        "accepts_several_images": accepts_image,
        "default_width": SIDE,
        "default_height": SIDE,
        "size_multiple": MULTIPLE,
        "frame_multiple": 4 if is_video else 1,
        "frames_argument": "num_frames" if is_video else None,
        "default_num_frames": FRAMES if is_video else None,
        "default_num_inference_steps": STEPS,
        "needs_pictures": [],
        "default_frame_rate": RATE if is_video else None,
        "defaults": {"height": SIDE, "width": SIDE},
        "takes_lora": True,
        "takes_latents": True,
        "prompt_grammar": None,
        "effective": {"device": "cpu", "dtype": "float32", "offload": "none"},
    }


def _is_number(value: object) -> bool:
    """Forms bring texts, which ranks read as the pipeline's annotations want them."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


class EngineDouble:
    """Orders are made one after the other, in a thread.

    Attributes:
        description: what the server is told of the pipeline; None where no rank was ready.
        gate: steps wait until it is set; it is, to begin with.
        failures: prompt to the failure that its orders end with, after their first step.
        state: of its only group.
        orders: all that were submitted.
        own: what its pipeline makes where a request leaves that out.
        letting_go: a cancelled order ends only once it is set, as ranks in a long step do.
    """

    def __init__(self, kind: str = "image", *, accepts_image: bool = False, max_queue: int = 64) -> None:
        self.description: dict[str, Any] | None = described(kind, accepts_image=accepts_image)
        self.max_queue = max_queue
        self.gate = threading.Event()
        self.gate.set()
        self.letting_go = threading.Event()
        self.letting_go.set()
        self.failures: dict[str, Failure] = {}
        self.state = "idle"
        self.orders: list[Order] = []
        self.is_closed = False
        frames = FRAMES if kind == "video" else None
        self.own = {"width": SIDE, "height": SIDE, "num_frames": frames, "num_inference_steps": STEPS}
        self.checks: list[GenerationRequest] = []
        self._cancelled: set[str] = set()
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._queue: Queue[tuple[Order, Listener] | None] = Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ---- what a server calls

    def start(self) -> None:
        """It has begun already."""

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """It is ready."""

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
        self.gate.set()
        self.letting_go.set()
        self._queue.put(None)
        self._thread.join(10)

    def require_room(self) -> None:
        if self.description is None or self.is_closed:
            raise NotReadyError("no group of ranks is ready. Try again.")
        if len(self._waiting) >= self.max_queue:
            raise QueueFullError(f"{self.max_queue} requests wait already. Try again in 7 s.", 7)

    def submit(self, order: Order, listener: Listener) -> None:
        with self._lock:
            self.require_room()
            self._waiting.append(order.id)
            self.orders.append(order)
        self._queue.put((order, listener))

    def cancel(self, order_id: str) -> None:
        self._cancelled.add(order_id)

    def check(self, request: GenerationRequest) -> Future[Checked]:
        self.checks.append(request)
        answer: Future[Checked] = Future()
        if self.description is None or self.is_closed:
            answer.set_exception(NotReadyError("no group of ranks is ready. Try again."))
        else:
            made = {
                "width": request.width or self.own["width"],
                "height": request.height or self.own["height"],
                "num_frames": request.num_frames or self.own["num_frames"],
                "num_inference_steps": request.num_inference_steps or self.own["num_inference_steps"],
            }
            answer.set_result(Checked(number=0, failure=self._refusal(request), **made))
        return answer

    def position(self, order_id: str) -> tuple[int, float] | None:
        with self._lock:
            if order_id not in self._waiting:
                return None
            place = self._waiting.index(order_id)
        return place, 1.5 * place

    def status(self) -> EngineStatus:
        rank = RankStatus(rank=0, pid=1, state="alive", beat_age_s=0.1, device_bytes=1000, host_bytes=2000)
        group = GroupStatus(number=0, state=self.state, ranks=[rank])  # type: ignore[arg-type]
        return EngineStatus(groups=[group], queue_depth=len(self._waiting), steps_per_s=2.5)

    # ---- what ranks do

    def _refusal(self, request: GenerationRequest) -> Failure | None:
        for name in ("width", "height"):
            value = getattr(request, name)
            if value is not None and value % MULTIPLE:
                message = (
                    f"{name}={value} is not a multiple of {MULTIPLE}. Try {value // MULTIPLE * MULTIPLE or MULTIPLE}."
                )
                return Failure(code="request_invalid", message=message, param=name)
        for name, value in request.arguments.items():
            if not _is_number(value):
                return Failure(code="request_invalid", message=f"{name}={value!r} is no number.", param=name)
        return None

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            order, listener = entry
            failure = self._make(order, listener)
            if failure is not None and failure.code == "cancelled":
                self.letting_go.wait(60)
            if failure is not None and self.is_closed:
                failure = Failure(code="engine_closed", message="the engine was closed.")
            listener(Ended(id=order.id, timings=Timings(queue_s=0.01, denoise_s=0.2, total_s=0.3), failure=failure))
        while not self._queue.empty():
            entry = self._queue.get()
            if entry is not None:
                listener = entry[1]
                listener(Ended(id=entry[0].id, failure=Failure(code="engine_closed", message="the engine was closed.")))

    def _is_cancelled(self, order: Order) -> bool:
        return order.id in self._cancelled or self.is_closed

    def _make(self, order: Order, listener: Listener) -> Failure | None:
        cancelled = Failure(code="cancelled", message="it was cancelled.")
        with self._lock:
            self._waiting.remove(order.id)
        if self._is_cancelled(order):
            return cancelled
        listener(Began(id=order.id, group=0))
        request = order.request
        steps = request.num_inference_steps or STEPS
        for item in range(request.num_images):
            listener(Stage(id=order.id, item=item, name="denoise"))
            for step in range(1, steps + 1):
                while not self.gate.wait(0.01):
                    if self._is_cancelled(order):
                        return cancelled
                if self._is_cancelled(order):
                    return cancelled
                event = StepEvent(item=item, stage=0, step=step, total=steps, elapsed_s=0.01 * step)
                listener(Step(id=order.id, event=event))
                if request.prompt in self.failures:
                    return self.failures[request.prompt]
                if step <= order.num_partials:
                    listener(self._partial(order, item, step - 1))
            for name in ("decode", "save"):
                listener(Stage(id=order.id, item=item, name=name))
            listener(Made(id=order.id, file=self._made(order, item)))
        return None

    def _partial(self, order: Order, item: int, index: int) -> Partial:
        path = Path(order.folder) / f"partial-{item}-{index}.png"
        Image.new("RGB", (8, 8), _COLOURS[index % 4]).save(path)
        return Partial(id=order.id, item=item, index=index, path=str(path))

    def _made(self, order: Order, item: int) -> MadeFile:
        request, folder = order.request, Path(order.folder)
        size = request.width or SIDE, request.height or SIDE
        seed = (request.seed or 0) + item
        is_video = self.description is not None and self.description["kind"] == "video"
        count = (request.num_frames or FRAMES) if is_video else 1
        rate = (request.frame_rate or RATE) if is_video else None
        frames = [Image.new("RGB", size, _COLOURS[(seed + frame) % 4]) for frame in range(count)]
        result = GenerationResult(
            kind="video" if is_video else "image",
            seed=seed,
            images=frames,
            frame_rate=rate,
            arguments={"prompt": request.prompt},
            elapsed_s=0.1,
        )
        name = order.format.name or ("mp4" if is_video else "png")
        path = folder / f"result-{item}.{name}"
        if is_video:
            write_video(result, path, {})
            write_thumbnail(frames, folder / "thumbnail.webp")
            write_spritesheet(frames, folder / "sheet.webp")
        elif name == "png":
            write_png(result, path, {})
        else:
            (write_jpeg if name == "jpeg" else write_webp)(result, path, {}, order.format.quality)
        return MadeFile(
            item=item,
            path=str(path),
            kind=result.kind,
            media_type="video/mp4" if is_video else f"image/{name}",
            num_bytes=path.stat().st_size,
            seed=seed,
            width=size[0],
            height=size[1],
            num_frames=count if is_video else None,
            frame_rate=rate,
            thumbnail=str(folder / "thumbnail.webp") if is_video else "",
            spritesheet=str(folder / "sheet.webp") if is_video else "",
        )

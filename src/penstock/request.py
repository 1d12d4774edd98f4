"""What a user asks of a pipeline, and what comes back: GenerationRequest -> StepEvent* -> GenerationResult.

Owns the shape of a request and the checks that need no model. Does not know torch, pipelines or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.errors import RequestError

OutputKind = Literal["image", "video", "audio"]

MAX_SEED = 2**63 - 1
MAX_FRAME_RATE = 1000


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One thing to generate. `None` leaves a value to the model folder's or the pipeline's own default.

    Attributes:
        prompt: what to draw; pipelines without a prompt take None.
        negative_prompt: what to avoid, where the pipeline takes one.
        width: pixels; must be a multiple of what the pipeline's VAE and patches need.
        height: pixels; likewise.
        num_inference_steps: denoising steps.
        num_frames: frames of a video.
        frame_rate: frames per second of a video; given to the pipeline where it takes one (`frame_rate`, `fps`).
        num_images: pictures (or videos) to make; number i has seed `seed + i` and equals a run of its own.
        seed: of the first picture; None draws one. The generator lives on the CPU, so that a seed
            means the same noise on every device.
        image: path of an input picture, where the pipeline takes one.
        pictures: further arguments that are pictures, by name: the paths of their files; several make a list.
        arguments: further arguments of the pipeline's `__call__`, by name.
        opens_files: whether a text `@FILE` among `arguments` stands for the picture in that file. A server that hands
            on what strangers wrote says False: then an argument that is a picture comes by `pictures`, or not at all.

    Raises:
        RequestError: for a value that no pipeline could use.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    num_images: int = 1
    seed: int | None = None
    image: str | None = None
    pictures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    opens_files: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "image"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{name} is a {type(value).__name__}, not a text. Make one request for each.")
        for name in ("width", "height", "num_inference_steps", "num_frames", "num_images"):
            value = getattr(self, name)
            if (value is not None or name == "num_images") and not is_whole(value, 1):
                raise RequestError(f"{name}={value!r} is not a whole number from 1 up. Give one.")
        if self.seed is not None and not is_whole(self.seed, 0, MAX_SEED - self.num_images + 1):
            raise RequestError(f"seed={self.seed!r} is out of range. Give a number from 0 to {MAX_SEED}.")
        if self.frame_rate is not None and not 0 < self.frame_rate <= MAX_FRAME_RATE:
            raise RequestError(f"frame_rate={self.frame_rate!r} is out of range. Try 16; the most is {MAX_FRAME_RATE}.")
        for name in ("arguments", "pictures"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise RequestError(f"{name} is a {type(value).__name__}. Give a mapping of names to values.")


def is_whole(value: object, least: int, most: int | None = None) -> bool:
    """Whether a value is a whole number (True and 64.0 are none) within bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return least <= value and (most is None or value <= most)


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One step of a running pipeline is done.

    Attributes:
        item: index of the picture, from 0.
        stage: index of the pipeline's progress bar within this picture, from 0; most pipelines have one.
        step: steps done in this stage.
        total: steps of this stage; 0 where the pipeline does not say.
        elapsed_s: seconds since the picture was begun.
    """

    item: int
    stage: int
    step: int
    total: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """One finished picture, video or sound.

    Attributes:
        kind: which of the three.
        seed: the seed that makes this very item again.
        images: PIL pictures: one for an image, all frames in order for a video, none for a sound.
        audio: float array [channels, samples] in [-1, 1], or None.
        sampling_rate_hz: of `audio`; None without it.
        frame_rate: frames per second of a video; None otherwise.
        arguments: what the pipeline was called with, JSON-able.
        elapsed_s: seconds the pipeline ran.
        path: the file that holds it, where an `Engine` made it: its ranks write what they make; None elsewhere. Then
            `images` has the picture of an image, and nothing of a video.
    """

    kind: OutputKind
    seed: int
    images: list[Any]
    audio: Any = None
    sampling_rate_hz: int | None = None
    frame_rate: float | None = None
    arguments: Mapping[str, Any]
    elapsed_s: float
    path: str | None = None

"""The messages between an engine and its ranks, and their one codec: msgpack over ZeroMQ.

Owns their shapes. Pictures and videos never travel here: a rank writes them into files, and tells their paths.
Does not know sockets, processes or pipelines.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from penstock.errors import RequestError
from penstock.request import GenerationRequest, OutputKind, StepEvent

T = TypeVar("T")


class FileFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a result is written.

    Attributes:
        name: png, jpeg or webp for a picture, mp4 for a video, wav for a sound; empty for the kind's own.
        quality: of jpeg and webp, 0 to 100; None takes the format's default.
    """

    name: str = ""
    quality: int | None = None


class Lora(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that a request wants: its name, the file on this machine, and its weight."""

    name: str
    path: str
    scale: float = 1.0


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A request and where its results go; what the engine is given, and hands to the ranks as it is.

    Attributes:
        id: unique among the orders of an engine.
        request: what is asked for; its seed is set.
        folder: into which the ranks write; the engine's user removes it.
        format: of the files.
        num_partials: pictures to make on the way, from unfinished latents, for each picture.
        loras: adapters to use; none means the model as it is.
        client: whose it is; the queue takes turns between clients.
    """

    id: str
    request: GenerationRequest
    folder: str
    format: FileFormat = FileFormat()
    num_partials: int = 0
    loras: tuple[Lora, ...] = ()
    client: str = ""


class MadeFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a rank has written, whole.

    Attributes:
        item: index of the picture, from 0.
        path: where it is.
        kind: image, video or audio.
        media_type: such as image/png.
        num_bytes: its size.
        seed: that makes this very item again.
        width: pixels; None for a sound.
        height: likewise.
        num_frames: of a video; None otherwise.
        frame_rate: frames per second of a video; None otherwise.
        sampling_rate_hz: of its sound; None without.
        thumbnail: path of a small WebP picture of a video's first frame; empty otherwise.
        spritesheet: path of a WebP picture with frames of a video, in order; empty otherwise.
        arguments: what the pipeline was called with.
        elapsed_s: seconds the pipeline ran.
    """

    item: int
    path: str
    kind: OutputKind
    media_type: str
    num_bytes: int
    seed: int
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    sampling_rate_hz: int | None = None
    thumbnail: str = ""
    spritesheet: str = ""
    arguments: dict[str, Any] = {}
    elapsed_s: float = 0.0


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the seconds of an order went: waiting, and on the rank that wrote its files, summed over its pictures."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    save_s: float = 0.0
    total_s: float = 0.0
    num_steps: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an order ended without a result.

    Attributes:
        code: request_invalid, out_of_memory, generation_failed, rank_died, rank_hung, cancelled, engine_closed.
        message: for the user: what happened, why, what to do.
        param: the argument at fault, where one is known.
    """

    code: str
    message: str
    param: str | None = None


# ---- what an order's listener hears, in this order: Began, (StepEvent | Partial | Stage | MadeFile)*, Ended


class Began(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An order has left the queue: a group of ranks works on it."""

    id: str
    group: int


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A denoising step is done."""

    id: str
    event: StepEvent


class Stage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Another stage of a picture begins: encode, denoise, decode or save."""

    id: str
    item: int
    name: str


class Partial(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A picture of unfinished latents; `index` counts those of an item from 0. A small file, of the order's format."""

    id: str
    item: int
    index: int
    path: str


class Made(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A result is written."""

    id: str
    file: MadeFile


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An order is over, on all of its ranks; `failure` is None where all was made. Nothing of it follows."""

    id: str
    timings: Timings = Timings()
    failure: Failure | None = None


OrderEvent = Began | Step | Stage | Partial | Made | Ended


# ---- between the engine and a rank


class Run(msgspec.Struct, frozen=True, tag=True):
    """Engine to every rank of a group: make these orders; several only as one batch."""

    orders: tuple[Order, ...]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Engine to every rank of a group: end an order at the next step."""

    id: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """Engine to one rank: would the pipeline take this request? It answers beside its work."""

    number: int
    request: GenerationRequest


class Close(msgspec.Struct, frozen=True, tag=True):
    """Engine to a rank: leave."""


ToRank = Run | Cancel | Check | Close


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank is being made ready; the fields are those of `LoadEvent`."""

    component: str
    done_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank can work.

    Attributes:
        pipeline: what the model is and takes, and the configuration that took effect (`engine/description.py`).
    """

    pipeline: dict[str, Any]


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank cannot start; `kind` is the name of our exception's class, and trying again would not help."""

    kind: str
    message: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A rank lives; sent twice a second by a thread of its own.

    Attributes:
        device_bytes: on a GPU all that torch has allocated; on the CPU the weights that are there at most.
        host_bytes: all that its process holds of the host's memory.
    """

    device_bytes: int = 0
    host_bytes: int = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a rank says to `Check`.

    Attributes:
        number: of the question.
        failure: why the pipeline would not take the request; None where it would.
        width: pixels of what it would make, also where the request leaves them to the pipeline; None where only the
            call itself tells.
        height: likewise.
        num_frames: likewise, of a video.
        num_inference_steps: likewise.
    """

    number: int
    failure: Failure | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None


class Idle(msgspec.Struct, frozen=True, tag=True):
    """A rank has ended a `Run` in order, and can take the next."""


FromRank = Loading | Ready | Refused | Beat | Checked | Idle | Step | Stage | Partial | Made | Ended

_ENCODER = msgspec.msgpack.Encoder()
_FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)


def encode(message: ToRank | FromRank) -> bytes:
    """The bytes of a message."""
    return _ENCODER.encode(message)


def require_plain(request: GenerationRequest) -> None:
    """Refuse a request that cannot travel to a rank.

    Raises:
        RequestError: for arguments that are no plain values.
    """
    try:
        _ENCODER.encode(request)
    except (TypeError, OverflowError) as error:
        raise RequestError(
            f"the request holds what cannot travel to a rank: {error}. Give texts, numbers, lists and mappings."
        ) from error


def read_from_rank(data: bytes) -> FromRank:
    """A message that a rank sent."""
    return _FROM_RANK.decode(data)


def read_to_rank(data: bytes) -> ToRank:
    """A message for a rank."""
    return _TO_RANK.decode(data)

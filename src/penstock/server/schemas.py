"""What clients may send and what they get: the fields of the API, their types and bounds.

Owns the shapes, as the OpenAI clients know them, and the fields that go beyond those. `null` means left out. Fields
that are not named here are arguments of the pipeline. Does not know what a pipeline takes, or how anything is made.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from penstock.request import MAX_FRAME_RATE, MAX_SEED

MOST_PROMPT = 32_000
MOST_PARTIALS = 3
SIZE_PATTERN = r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$"
LORA_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"


ADVICE = {
    "quality": "There are no levels of quality here: leave it out, and give num_inference_steps for more or less work",
    "background": "Pictures here have no transparency: leave it out, or give opaque",
    "moderation": "Nothing is moderated here: leave it out",
    "style": "There are no styles here: say it in the prompt",
    "input_fidelity": "Leave it out, and give the pipeline's strength where it takes one",
    "output_format": "Give png, jpeg or webp",
    "size": "Give WIDTHxHEIGHT, such as 1024x768, or auto",
    "seconds": 'Give a text such as "4"',
}
"""What to do instead of a value that cannot be, by field."""
ADVICE_ELSEWHERE = {name: ADVICE[name] for name in ("quality", "style")}
"""What to do instead of a field that an endpoint does not have."""
MOST_IMAGES = 1000
"""Of one request, whatever the server's own most is: their seeds must be numbers that a seed can be."""


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    return text


Text = Annotated[str, AfterValidator(_no_nul)]


class LoraAsk(BaseModel):
    """An adapter of the server's --lora-dir."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=LORA_NAME_PATTERN, description="Its file's name, without .safetensors.")
    scale: float = Field(default=1.0, ge=-100, le=100, description="Its weight.")


def _listed(value: Any) -> Any:
    """One adapter as a list of one; in a form, JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError('in a form it is JSON, such as [{"name": "crayon", "scale": 0.8}]') from error
    return [value] if isinstance(value, dict) else value


class Ask(BaseModel):
    """What all requests to make something share. Further fields are arguments of the pipeline."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Text | None = Field(default=None, max_length=MOST_PROMPT, description="What to make.")
    model: Text | None = Field(default=None, max_length=500, description="The model's name; this server has one.")
    negative_prompt: Text | None = Field(default=None, max_length=MOST_PROMPT, description="What to avoid.")
    size: str | None = Field(default=None, pattern=SIZE_PATTERN, description="WIDTHxHEIGHT, or auto.")
    width: int | None = Field(default=None, ge=1, lt=10**6, description="Pixels, in place of size.")
    height: int | None = Field(default=None, ge=1, lt=10**6, description="Pixels, in place of size.")
    num_inference_steps: int | None = Field(default=None, ge=1, lt=10**6, description="Denoising steps.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED - MOST_IMAGES, description="Of the first; drawn where left out."
    )
    lora: Annotated[list[LoraAsk] | None, BeforeValidator(_listed)] = Field(
        default=None, max_length=8, description="Adapters of the server's --lora-dir to use."
    )
    user: Text | None = Field(default=None, max_length=500, description="Goes into the server's log.")
    safety_identifier: Text | None = Field(default=None, max_length=500, description="Goes into the server's log.")


class ImageAsk(Ask):
    """A request for pictures. Further fields are arguments of the pipeline."""

    n: int | None = Field(default=None, ge=1, description="How many; number i has seed `seed + i`.")
    quality: Literal["auto"] | None = Field(default=None, description="Only auto: give num_inference_steps instead.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Pictures here are opaque.")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="Nothing is moderated here.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(default=None, description="png where left out.")
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Quality of jpeg and webp.")
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="b64_json where left out.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    detach: bool | None = Field(
        default=None, description="Answer 202 with the job at once; it goes on when the client leaves."
    )
    partial_images: int | None = Field(default=None, ge=0, le=MOST_PARTIALS, description="Unfinished pictures of each.")


class EditAsk(ImageAsk):
    """A request to change pictures; they are files of the form, or data: URLs in JSON."""

    input_fidelity: Literal["low"] | None = Field(default=None, description="Only low: give strength instead.")


class VariationAsk(ImageAsk):
    """A request for pictures like another; a prompt is not needed."""


def _seconds(value: Any) -> Any:
    """Clients send seconds as a text; numbers are as clear."""
    if isinstance(value, bool) or value is None or not isinstance(value, (str, int, float)):
        return value
    return str(value)


def _one(value: Any) -> Any:
    """Clients that know only n=1 may say so."""
    if value not in (1, "1", None):
        raise ValueError("one video is made by a request: ask several times for several")
    return value


class VideoAsk(Ask):
    """A request for a video. Further fields are arguments of the pipeline."""

    seconds: Annotated[str | None, BeforeValidator(_seconds)] = Field(
        default=None, pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?$", description="Its duration, as a text."
    )
    num_frames: int | None = Field(default=None, ge=1, lt=10**6, description="In place of seconds.")
    fps: float | None = Field(default=None, ge=1, le=MAX_FRAME_RATE, description="Frames per second.")
    n: Annotated[Literal[1, "1"] | None, BeforeValidator(_one)] = Field(default=None, description="One video is made.")

    @field_validator("seconds")
    @classmethod
    def _some_time(cls, value: str | None) -> str | None:
        if value is not None and not float(value) > 0:
            raise ValueError("it is no time")
        return value


class RemixAsk(BaseModel):
    """A new prompt for a video that was made."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(max_length=MOST_PROMPT, description="What to make of it.")


# ---- answers


class ErrorDetail(BaseModel):
    """Why a request failed."""

    message: str = Field(description="For people: what happened, why, what to do.")
    type: str
    param: str | None = Field(description="The field at fault, where one is known.")
    code: str | None = Field(description="For programs.")


class ErrorEnvelope(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class TokenDetails(BaseModel):
    """Of the input."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Clients want it; penstock counts pictures and seconds, not tokens, so all of it is 0."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails(text_tokens=0, image_tokens=0)


class ImageItem(BaseModel):
    """A picture; either field is there."""

    b64_json: str | None = None
    url: str | None = None
    seed: int | None = Field(default=None, description="That makes this very picture again.")

    @model_serializer(mode="wrap")
    def _of_what_is_there(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ImagesAnswer(BaseModel):
    """Pictures."""

    created: int
    data: list[ImageItem]
    size: str
    output_format: Literal["png", "jpeg", "webp"]
    quality: None = Field(default=None, description="Pictures here have no levels of quality.")
    background: Literal["opaque"] = "opaque"
    usage: Usage = Usage()
    job_id: str
    timings: dict[str, float] = Field(description="Seconds: queue, encode, denoise, decode, save, total.")


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class FileAnswer(BaseModel):
    """A file of a job; its URL opens it without a key, and nobody can guess it."""

    name: str
    url: str
    role: Literal["result", "thumbnail", "spritesheet"]
    media_type: str
    num_bytes: int
    item: int
    seed: int | None
    facts: dict[str, Any]


class VideoAnswer(BaseModel):
    """A video job; the fields of OpenAI's, then ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: JobError | None
    seed: int | None
    num_frames: int | None
    frame_rate: float | None
    queue_position: int | None = Field(description="How many are made before it; null once it is in progress.")
    estimated_start_s: float | None = Field(description="About how many seconds until it begins.")


class JobAnswer(BaseModel):
    """A job of whichever kind."""

    id: str
    object: Literal["job"] = "job"
    kind: Literal["image", "video", "audio"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    started_at: float | None
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    seconds: str | None
    size: str | None
    seed: int | None
    arguments: dict[str, Any]
    remixed_from: str | None
    error: JobError | None
    files: list[FileAnswer]
    timings: dict[str, float]
    queue_position: int | None
    estimated_start_s: float | None


class VideoPage(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None


class JobPage(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    """It is gone: ranks, files and record."""

    id: str
    object: Literal["video.deleted", "job.deleted"]
    deleted: Literal[True] = True


class ModelAnswer(BaseModel):
    """The model; what it takes is null until its ranks are ready."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "penstock"
    kind: Literal["image", "video", "audio"] | None = None
    description: dict[str, Any] | None = Field(default=None, description="What its pipeline is and takes.")


class ModelPage(BaseModel):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]

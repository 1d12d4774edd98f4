"""Messages survive the wire."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.errors import RequestError
from penstock.request import GenerationRequest, StepEvent
from penstock.wire import (
    Beat,
    Cancel,
    Check,
    Checked,
    Close,
    Ended,
    Failure,
    FileFormat,
    Idle,
    Loading,
    Lora,
    Made,
    MadeFile,
    Order,
    Partial,
    Ready,
    Refused,
    Run,
    Stage,
    Step,
    Timings,
    encode,
    read_from_rank,
    read_to_rank,
    require_plain,
)

REQUEST = GenerationRequest(
    prompt="ä", seed=2**62, frame_rate=12.5, pictures={"image": ("a", "b")}, arguments={"sigmas": [1.0, 0.5], "x": None}
)
ORDER = Order(
    id="1", request=REQUEST, folder="/f", format=FileFormat(name="jpeg", quality=3), loras=(Lora(name="l", path="p"),)
)
FILE = MadeFile(item=1, path="/f/a.png", kind="image", media_type="image/png", num_bytes=3, seed=2)


@pytest.mark.parametrize("message", [Run((ORDER,)), Cancel("1"), Check(3, REQUEST), Close()], ids=repr)
def test_what_ranks_are_told(message: Any) -> None:
    assert read_to_rank(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Loading(component="vae", done_bytes=1, total_bytes=2),
        Ready(pipeline={"kind": "image", "parameters": {"a": {"default": None}}}),
        Refused(kind="ConfigError", message="no"),
        Beat(device_bytes=1),
        Checked(number=1, failure=Failure(code="request_invalid", message="no", param="width")),
        Idle(),
        Step(id="1", event=StepEvent(item=0, stage=1, step=2, total=3, elapsed_s=0.5)),
        Stage(id="1", item=0, name="decode"),
        Partial(id="1", item=0, index=1, path="p"),
        Made(id="1", file=FILE),
        Ended(id="1", timings=Timings(queue_s=1.0), failure=None),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_ranks_say(message: Any) -> None:
    assert read_from_rank(encode(message)) == message


def test_what_cannot_travel_is_refused_before() -> None:
    require_plain(REQUEST)
    with pytest.raises(RequestError, match="cannot travel to a rank.*object"):
        require_plain(GenerationRequest(arguments={"latents": object()}))
    with pytest.raises(RequestError, match="cannot travel"):
        require_plain(GenerationRequest(arguments={"n": 2**70}))

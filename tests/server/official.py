"""The official client, for tests, and what they look at its answers with."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.server.live import Live

DEPRECATED = [
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # create_variation; both are still spoken
]

_opened: list[openai.OpenAI] = []


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Closes the clients of a test."""
    yield
    while _opened:
        _opened.pop().close()


def client(live: Live, key: str = "unused", **options: Any) -> openai.OpenAI:
    """The official client, which checks required fields, and repeats nothing unless told to."""
    given = {"max_retries": 0, **options}
    api = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, _strict_response_validation=True, **given)
    _opened.append(api)
    return api


def picture(data: str | bytes) -> tuple[str, tuple[int, int]]:
    """Format and size of a picture, once all of it is decoded."""
    content = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return str(image.format), image.size


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    """A picture file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format="PNG")
    return buffer.getvalue()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Look again and again, until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)

"""Reading back what a file says of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image

_PNG_KEY = "penstock"
_FFMPEG_KEY = "comment"


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts inside a PNG, MP4 or WAV that `penstock.save` wrote; empty for a file from elsewhere."""
    if Path(path).suffix.lower() == ".png":
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get(_PNG_KEY, "{}")
    else:
        with av.open(str(path)) as container:
            text = container.metadata.get(_FFMPEG_KEY, "{}")
    try:
        facts = json.loads(text)
    except ValueError:  # somebody else's comment
        return {}
    return facts if isinstance(facts, dict) else {}

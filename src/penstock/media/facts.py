"""Reading back what a file says of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
from PIL import Image

from penstock.media.pictures import EXIF_DESCRIPTION

_PNG_KEY = "penstock"
_FFMPEG_KEY = "comment"


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts inside a file that `penstock.save` wrote; empty for a file from elsewhere."""
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get(_PNG_KEY, "{}")
    elif suffix in (".jpg", ".jpeg", ".webp"):
        with Image.open(path) as picture:
            text = picture.getexif().get(EXIF_DESCRIPTION, "{}")
    else:
        with av.open(str(path)) as container:
            text = container.metadata.get(_FFMPEG_KEY, "{}")
    try:
        facts = json.loads(text)
    except ValueError:  # somebody else's comment
        return {}
    return facts if isinstance(facts, dict) else {}

"""Pictures as PNG, with what made them in the file's text chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from penstock.request import GenerationResult

_KEY = "penstock"


def write_png(result: GenerationResult, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the picture; text chunks: `prompt`, `seed`, and all facts as JSON under `penstock`."""
    chunks = PngInfo()
    chunks.add_itxt("prompt", str(result.arguments.get("prompt") or ""))
    chunks.add_itxt("seed", str(result.seed))
    chunks.add_itxt(_KEY, json.dumps(facts))
    result.images[0].save(path, format="PNG", pnginfo=chunks)

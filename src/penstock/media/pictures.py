"""Pictures as JPEG and WebP, small pictures of videos, and the formats that a result can have.

Owns those formats. Does not know where files go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from penstock.request import GenerationResult

_QUALITY = 90
_MOST_EXIF_BYTES = 60_000  # JPEG has room for 64 KiB
EXIF_DESCRIPTION = 0x010E
"""The EXIF tag that holds the facts, as JSON."""

_THUMBNAIL = (480, 480)
_SHEET_COLUMNS = 4
_SHEET_FRAMES = 16
_SHEET_CELL = (240, 240)


def write_jpeg(result: GenerationResult, path: Path, facts: Mapping[str, Any], quality: int | None = None) -> None:
    """Write the picture as JPEG; the facts are JSON in the EXIF description."""
    _write(result.images[0], path, "JPEG", facts, quality)


def write_webp(result: GenerationResult, path: Path, facts: Mapping[str, Any], quality: int | None = None) -> None:
    """Write the picture as WebP; the facts are JSON in the EXIF description."""
    _write(result.images[0], path, "WEBP", facts, quality)


def _write(picture: Image.Image, path: Path, name: str, facts: Mapping[str, Any], quality: int | None) -> None:
    text = json.dumps(facts)
    if len(text) > _MOST_EXIF_BYTES:
        text = json.dumps({**facts, "arguments": "too long for this format"})
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = text
    picture.save(path, format=name, quality=_QUALITY if quality is None else quality, exif=exif)


def write_thumbnail(frames: Sequence[Image.Image], path: Path) -> None:
    """Write the first frame as a WebP of at most 480 pixels."""
    small = frames[0].copy()
    small.thumbnail(_THUMBNAIL)
    small.save(path, format="WEBP")


def write_spritesheet(frames: Sequence[Image.Image], path: Path) -> None:
    """Write up to 16 frames, evenly spread, as one WebP of four columns, in reading order."""
    count = min(len(frames), _SHEET_FRAMES)
    cells = []
    for place in range(count):
        cell = frames[place * len(frames) // count].copy()
        cell.thumbnail(_SHEET_CELL)
        cells.append(cell)
    width, height = cells[0].size
    rows = -(-count // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (min(count, _SHEET_COLUMNS) * width, rows * height))
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % _SHEET_COLUMNS * width, place // _SHEET_COLUMNS * height))
    sheet.save(path, format="WEBP")

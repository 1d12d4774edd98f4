"""Reads a picture back: which coloured shapes it shows, where, and whether that is what a prompt asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from draw import PALETTE, WHITE
from grammar import COLOURS, RELATIONS, SHAPES, Thing, mentions

MIN_AREA = 40
DEBRIS_AREA = 12
MIN_COVER = 0.5
MAX_CORE_ERROR = 40.0
MIN_OVERLAP = 0.75
MAX_STRETCH = 1.35
MIN_DISTANCE = 12.0
AXES = {"left of": 0, "right of": 0, "above": 1, "below": 1}


@dataclass(frozen=True)
class Found:
    """One connected patch of one colour.

    Attributes:
        colour: The palette's name of the colour.
        shape: The best fitting shape, or None if none fits.
        centre: Centroid (x, y) in pixels.
        area: Pixels.
    """

    colour: str
    shape: str | None
    centre: tuple[float, float]
    area: int

    def matches(self, thing: Thing) -> int:
        """How many of colour and shape are the thing's (0 to 2)."""
        return (self.colour == thing.colour) + (self.shape == thing.shape)


@dataclass(frozen=True)
class Verdict:
    """What is right about a picture.

    Attributes:
        colour: The colours of the things found are the ones asked for.
        shape: The shapes of the things found are the ones asked for.
        relation: The things stand as asked; for one thing, that there is one.
        everything: Each place shows just the thing asked for, in a clean colour, and there is nothing else.
    """

    colour: bool
    shape: bool
    relation: bool
    everything: bool


def colour_masks(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Where each palette colour covers at least half of a pixel, the rest being white.

    A pixel on an edge is a mixture `white + cover * (colour - white)`; it belongs to the colour whose line of
    mixtures passes nearest.

    Args:
        picture: `(height, width, 3)` bytes.
    """
    pixels = picture.astype(np.float64) - WHITE
    covers, errors = [], []
    for colour in COLOURS:
        direction = np.array(PALETTE[colour], dtype=np.float64) - WHITE
        cover = (pixels @ direction / (direction @ direction)).clip(0, 1)
        covers.append(cover)
        errors.append(np.linalg.norm(pixels - cover[..., None] * direction, axis=-1))
    nearest = np.argmin(errors, axis=0)
    return {name: (nearest == i) & (covers[i] >= MIN_COVER) for i, name in enumerate(COLOURS)}


def patches(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its 4-connected parts."""
    left = mask.copy()
    parts = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        part = np.zeros_like(mask)
        part[start] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= mask
            if (grown == part).all():
                break
            part = grown
        left &= ~part
        parts.append(part)
    return parts


def template(shape: str, height: int, width: int) -> np.ndarray:
    """The shape, stretched to fill a box: `(height, width)` booleans."""
    scale = 8
    image = Image.new("L", (width * scale, height * scale))
    canvas = ImageDraw.Draw(image)
    right, bottom = width * scale - 1, height * scale - 1
    if shape == "circle":
        canvas.ellipse((0, 0, right, bottom), fill=255)
    elif shape == "square":
        canvas.rectangle((0, 0, right, bottom), fill=255)
    else:
        canvas.polygon([(right / 2, 0), (right, bottom), (0, bottom)], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) >= 128


def shape_of(part: np.ndarray) -> str | None:
    """The shape that overlaps a patch best, if it overlaps well and the patch is about as wide as high."""
    rows, columns = np.nonzero(part)
    box = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = box.shape
    if max(height, width) > MAX_STRETCH * min(height, width):
        return None
    overlaps = {}
    for shape in SHAPES:
        wanted = template(shape, height, width)
        overlaps[shape] = (wanted & box).sum() / (wanted | box).sum()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def core_error(picture: np.ndarray, part: np.ndarray, colour: str) -> float:
    """Mean distance of the patch's inner pixels from the palette's colour, in byte units."""
    core = part.copy()
    core[1:-1, 1:-1] = part[1:-1, 1:-1] & part[:-2, 1:-1] & part[2:, 1:-1] & part[1:-1, :-2] & part[1:-1, 2:]
    if not core.any():
        return float("inf")
    return float(np.linalg.norm(picture[core].astype(np.float64) - PALETTE[colour], axis=-1).mean())


def find(picture: np.ndarray) -> tuple[list[Found], bool]:
    """List the things in a picture.

    Args:
        picture: `(height, width, 3)` bytes.

    Returns:
        The things, and whether the picture is clean: colours near the palette's and no debris.
    """
    found, clean = [], True
    for colour, mask in colour_masks(picture).items():
        for part in patches(mask):
            area = int(part.sum())
            if area < MIN_AREA:
                clean &= area < DEBRIS_AREA
                continue
            rows, columns = np.nonzero(part)
            clean &= core_error(picture, part, colour) <= MAX_CORE_ERROR
            found.append(Found(colour, shape_of(part), (float(columns.mean()), float(rows.mean())), area))
    return found, clean


def check(picture: Image.Image | np.ndarray, prompt: str) -> Verdict:
    """Compare a picture with its prompt.

    Args:
        picture: RGB picture.
        prompt: A prompt of the grammar.
    """
    found, clean = find(np.asarray(picture))
    things = [thing for _, thing in mentions(prompt)]
    colour = sorted(patch.colour for patch in found) == sorted(thing.colour for thing in things)
    shape = sorted(str(patch.shape) for patch in found) == sorted(thing.shape for thing in things)
    if len(found) != len(things):
        return Verdict(colour, shape, False, False)
    if len(things) == 1:
        return Verdict(colour, shape, True, clean and found[0].matches(things[0]) == 2)
    relation = next(name for name in RELATIONS if f" {name} " in prompt.lower())
    axis, backwards = AXES[relation], relation in ("right of", "below")
    ordered = sorted(found, key=lambda patch: patch.centre[axis], reverse=backwards)
    apart = [abs(ordered[0].centre[i] - ordered[1].centre[i]) for i in (axis, 1 - axis)]
    matched = [patch.matches(thing) for patch, thing in zip(ordered, things, strict=True)]
    swapped = [patch.matches(thing) for patch, thing in zip(ordered[::-1], things, strict=True)]
    stands = apart[0] >= MIN_DISTANCE and apart[0] > apart[1] and sum(matched) >= sum(swapped)
    return Verdict(colour, shape, stands, clean and stands and matched == [2, 2])

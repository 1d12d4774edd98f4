"""What the model is and takes, as the engine describes it, in the questions that a server asks.

Owns the reading of `Engine.description`. Does not know HTTP or jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.config import suggestion
from penstock.request import OutputKind

_SHOWN_PARAMETERS = 40
_INSTEAD = {
    "generator": "seed",
    "num_images_per_prompt": "n",
    "num_videos_per_prompt": "n",
    "num_waveforms_per_prompt": "n",
    "output_type": "output_format",
    "cfg_scale": "guidance_scale",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
}
"""What people give to pipelines and other servers, and what the same is called here."""


class Pipeline:
    """A pipeline as `Engine.description` tells of it.

    Args:
        description: of the engine.

    Attributes:
        kind: what it makes.
        name: of its class.
        parameters: of its `__call__`: name to type, default, is_picture.
        frame_rate: of its videos where none is asked for; None where it makes none.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._description = description
        self.kind: OutputKind = description["kind"]
        self.name: str = description["pipeline"]
        self.parameters: Mapping[str, Mapping[str, Any]] = description["parameters"]
        self.frame_rate: float | None = description.get("default_frame_rate")

    @property
    def takes_lora(self) -> bool:
        """Whether adapters can be put on it."""
        return bool(self._description.get("takes_lora"))

    @property
    def accepts_image(self) -> bool:
        """Whether it begins from a picture."""
        return bool(self._description.get("accepts_image"))

    @property
    def accepts_several_images(self) -> bool:
        """Whether it begins from several pictures at once."""
        return bool(self._description.get("accepts_several_images"))

    @property
    def pictures(self) -> list[str]:
        """Its arguments that are pictures."""
        return [name for name, facts in self.parameters.items() if facts.get("is_picture")]

    @property
    def mask(self) -> str | None:
        """Its argument that is a mask."""
        return self._description.get("accepts_mask") or None

    def takes(self, name: str) -> bool:
        """Whether its `__call__` has such an argument that a client may set."""
        return name in self.parameters

    def requires(self, name: str) -> bool:
        """Whether its `__call__` cannot do without such an argument."""
        return bool(self.parameters.get(name, {}).get("is_required"))

    def unknown(self, name: str, known: list[str]) -> str:
        """Why a field is refused, and what may have been meant.

        Args:
            name: of the field.
            known: fields of the API that fit here.
        """
        if name in _INSTEAD:
            return f"{name!r} is no field here. Give {_INSTEAD[name]!r}."
        names = list(self.parameters)
        listed = ", ".join(names[:_SHOWN_PARAMETERS])
        return f"{self.name} takes no {name!r}{suggestion(name, [*known, *names])}. It takes {listed}."

    def size(self, width: int | None, height: int | None) -> tuple[int | None, int | None]:
        """A size with what is left open filled in by the pipeline's own, where that is known."""
        return width or self._description.get("default_width"), height or self._description.get("default_height")

    def largest_size(self, width: int, height: int, most_pixels: int) -> tuple[int, int]:
        """The largest size of about the same shape within a number of pixels."""
        multiple = int(self._description.get("size_multiple") or 1)
        scale = math.sqrt(most_pixels / (width * height))
        side = max(int(width * scale) // multiple * multiple, multiple)
        other = min(int(height * scale), most_pixels // side) // multiple * multiple
        return side, max(other, multiple)

    def num_frames(self, seconds: float, frame_rate: float) -> int:
        """The number of frames that the pipeline can make which is nearest to a duration."""
        multiple = int(self._description.get("frame_multiple") or 1)
        frames = seconds * frame_rate
        if multiple == 1:
            return max(1, round(frames))
        return max(0, round((frames - 1) / multiple)) * multiple + 1

    @property
    def default_num_frames(self) -> int | None:
        """Frames of a video where none are asked for."""
        return self._description.get("default_num_frames")


def seconds_of(num_frames: int | None, frame_rate: float | None) -> str:
    """A duration as clients show it: to a tenth of a second; "0" where it is not known."""
    if not num_frames or not frame_rate:
        return "0"
    seconds = num_frames / frame_rate
    return f"{seconds:.{1 if seconds >= 0.1 else 3}f}".rstrip("0").rstrip(".")

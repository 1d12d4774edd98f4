"""What pipelines return, read into pictures, frames, sound and arrays.

Owns the forms that stock pipelines use: `images`, `frames`, `audio(s)`; PIL, numpy, torch; batches of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from penstock.errors import GenerationError
from penstock.request import OutputKind

_CHANNELS = (1, 3, 4)
_RATE_OWNERS = ("vocoder", "audio_vae", "vae")
_RATE_KEYS = ("output_sampling_rate", "sampling_rate", "sample_rate")


@dataclass(frozen=True, kw_only=True)
class Output:
    """The first item of what a pipeline returned; the attributes are those of `GenerationResult`."""

    kind: OutputKind
    images: list[Image.Image]
    audio: npt.NDArray[np.float32] | None
    sampling_rate_hz: int | None


def read_output(pipeline: Any, output: Any) -> Output:
    """Read the only picture, video or sound of what a pipeline returned.

    Raises:
        GenerationError: for an output that holds none, or several: none is dropped in silence.
    """
    return read_outputs(pipeline, output, 1)[0]


def read_outputs(pipeline: Any, output: Any, count: int) -> list[Output]:
    """Read the pictures, videos or sounds of what a pipeline returned for a batch.

    Raises:
        GenerationError: for an output that holds none of these, or not as many.
    """
    images, frames = first_present(output, "images", "image"), first_present(output, "frames")
    sound = first_present(output, "audio", "audios")
    kind: OutputKind = "image" if images is not None else "video" if frames is not None else "audio"
    if images is None and frames is None and sound is None:
        raise GenerationError(
            f"{type(pipeline).__name__} returned {type(output).__name__}, which holds no images, frames or audio. "
            "penstock runs pipelines that make pictures, videos or sound."
        )
    pictures = _items(pipeline, images if kind == "image" else frames, count) if kind != "audio" else [[]] * count
    sounds = [None] * count if sound is None else _items(pipeline, sound, count)
    return [
        Output(
            kind=kind,
            images=_pictures(picture),
            audio=None if one is None else np.atleast_2d(to_array(one)).astype(np.float32),
            sampling_rate_hz=None if one is None else sampling_rate(pipeline),
        )
        for picture, one in zip(pictures, sounds, strict=True)
    ]


def _items(pipeline: Any, batch: Any, count: int) -> list[Any]:
    """The items of a batch.

    Raises:
        GenerationError: for another number of them.
    """
    if isinstance(batch, Image.Image) and count == 1:
        return [batch]
    if len(batch) != count:
        raise GenerationError(
            f"{type(pipeline).__name__} returned {len(batch)} results from one call; penstock reads "
            f"{'one' if count == 1 else count}. Leave out the arguments that ask for several."
        )
    return list(batch)


def first_present(output: Any, *names: str) -> Any:
    """The first attribute of these names that is there and not None, or None."""
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def to_array(value: Any) -> npt.NDArray[Any]:
    """An array from PIL pictures, tensors, arrays, and lists of them."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return np.asarray(value.float() if value.is_floating_point() else value)
    if isinstance(value, (list, tuple)):
        return np.stack([to_array(item) for item in value])
    return np.asarray(value)


def sampling_rate(pipeline: Any) -> int:
    """Samples per second of the sound that a pipeline makes, from its vocoder's or VAE's config.

    Raises:
        GenerationError: where no component names one.
    """
    for name in _RATE_OWNERS:
        config = getattr(getattr(pipeline, name, None), "config", None)
        rate = first_present(config, *_RATE_KEYS)
        if rate:
            return int(rate)
    raise GenerationError(
        f"{type(pipeline).__name__} made sound, but none of its components names a sampling rate in its config."
    )


def _pictures(value: Any) -> list[Image.Image]:
    """PIL pictures from PIL, (nested) lists, or floats [..., H, W, C] or [..., C, H, W] in [0, 1]."""
    if isinstance(value, Image.Image):
        return [value.convert("RGB")]
    if isinstance(value, (list, tuple)):
        return [picture for item in value for picture in _pictures(item)]
    return [Image.fromarray(pixels) for pixels in _pixels(to_array(value))]


def _pixels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Bytes [N, H, W, 3] from floats in [0, 1], or bytes, with channels last or first."""
    array = array.reshape(-1, *array.shape[-3:])
    if array.shape[-1] not in _CHANNELS and array.shape[1] in _CHANNELS:
        array = np.moveaxis(array, 1, -1)
    if array.dtype != np.uint8:
        array = (np.clip(np.nan_to_num(array), 0, 1) * 255).round().astype(np.uint8)
    return array.repeat(3, axis=-1) if array.shape[-1] == 1 else array[..., :3]

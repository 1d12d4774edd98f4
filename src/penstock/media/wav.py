"""Sound as WAV, 16 bits per sample, with what made it in the file's comment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from penstock.request import GenerationResult

_FACTS_KEY = "comment"


def to_int16(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Samples [channels, samples] in [-1, 1] as 16-bit integers; louder ones are clipped."""
    samples = np.clip(np.nan_to_num(audio), -1, 1) * 32767
    return np.asarray(samples.round(), dtype=np.int16)


def layout_of(audio: npt.NDArray[np.float32]) -> str:
    """The name that FFmpeg gives to so many channels."""
    channels = audio.shape[0]
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels}c")


def audio_frame(result: GenerationResult) -> av.AudioFrame:
    """All of a result's sound as one frame of interleaved samples."""
    samples = np.ascontiguousarray(to_int16(result.audio).T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout_of(result.audio))
    frame.sample_rate = result.sampling_rate_hz or 0
    frame.pts = 0
    return frame


def write_wav(result: GenerationResult, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the sound, and the facts as JSON in the file's comment."""
    with av.open(str(path), "w", format="wav") as container:
        container.metadata[_FACTS_KEY] = json.dumps(facts)
        stream: Any = container.add_stream("pcm_s16le", rate=result.sampling_rate_hz, layout=layout_of(result.audio))
        container.mux(stream.encode(audio_frame(result)))
        container.mux(stream.encode(None))

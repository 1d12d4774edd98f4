"""Videos as MP4: H.264, and AAC where the pipeline makes sound, written in this process by PyAV.

The FFmpeg in PyAV's wheels carries x264, which is under the GPL; penstock only calls it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from penstock.media.wav import audio_frame, layout_of
from penstock.request import GenerationResult

_QUALITY = {"crf": "18", "preset": "veryfast"}  # visually lossless; H.264's own scale
_FACTS_KEY = "comment"


def write_video(result: GenerationResult, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the frames, the sound if there is one, and the facts as JSON in the file's comment.

    yuv420p needs even sides: an odd picture gets one more row or column of its edge.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata[_FACTS_KEY] = json.dumps(facts)
        rate = Fraction(result.frame_rate or 1).limit_denominator(1001)
        video = container.add_stream("libx264", rate=rate, options=_QUALITY)
        audio = _audio_stream(container, result)
        frames = [_even(image) for image in result.images]
        video.width, video.height = frames[0].size
        video.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            _write_audio(container, audio, result)


def _even(image: Image.Image) -> Image.Image:
    right, bottom = image.width % 2, image.height % 2
    if not right and not bottom:
        return image
    edge = np.pad(np.asarray(image), ((0, bottom), (0, right), (0, 0)), mode="edge")
    return Image.fromarray(edge)


def _audio_stream(container: Any, result: GenerationResult) -> Any:
    if result.audio is None:
        return None
    return container.add_stream("aac", rate=result.sampling_rate_hz, layout=layout_of(result.audio))


def _write_audio(container: Any, stream: Any, result: GenerationResult) -> None:
    resampler = av.AudioResampler(
        format=stream.format, layout=stream.layout, rate=stream.rate, frame_size=stream.frame_size
    )
    for piece in [*resampler.resample(audio_frame(result)), *resampler.resample(None)]:
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))

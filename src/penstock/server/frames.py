"""The first frame of a video, as a picture.

Owns the decoding of videos that clients send. Does not know where they come from.
"""

from __future__ import annotations

from pathlib import Path

import av


def write_first_frame(video: Path, picture: Path, most_pixels: int) -> None:
    """Write the first frame of a video as PNG.

    Args:
        video: the file; MP4, and nothing else is tried.
        picture: what is written.
        most_pixels: of a frame.

    Raises:
        ValueError: saying why it cannot be read.
    """
    try:
        with av.open(str(video), format="mp4") as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            stream = container.streams.video[0]
            if stream.width * stream.height > most_pixels:
                raise ValueError(f"{stream.width}x{stream.height} is more than {most_pixels} pixels")
            for frame in container.decode(stream):
                frame.to_image().save(picture, format="PNG")
                return
    except (av.FFmpegError, OSError) as error:
        raise ValueError(str(error)) from error
    raise ValueError("it has no frame")

"""Pictures that clients send become files of ours, once they are known to be harmless.

Owns what is accepted: the kind by its first bytes, the size in bytes and pixels, whether it is whole. Nothing that a
client says about a file is believed, and its name is never used. Does not know HTTP or jobs.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, ImageFile

from penstock.bytesize import format_bytes
from penstock.errors import RequestError

PictureKind = Literal["png", "jpeg", "webp", "gif"]

MEDIA_TYPES: dict[PictureKind, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
}
"""What is taken; of a GIF that moves, the first picture is meant."""

_HEAD_BYTES = 32
_CHUNK_BYTES = 1024**2
_PNG_HEAD_BYTES = 8
_PNG_SUM_BYTES = 4


class TooLargeError(RequestError):
    """What was sent has more bytes or pixels than the server takes."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file that a client sent, in a folder of ours.

    Attributes:
        path: where it is; made up here.
        kind: by its first bytes.
        num_bytes: its size.
        width: pixels.
        height: likewise.
    """

    path: str
    kind: PictureKind
    num_bytes: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one file may be.

    Attributes:
        num_bytes: at most.
        num_pixels: at most, width by height.
    """

    num_bytes: int
    num_pixels: int


def kind_of(head: bytes) -> PictureKind | None:
    """What a file is by its first 32 bytes; None for anything that is not taken."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return None


def accept(source: bytes | BinaryIO, folder: str | Path, limits: Limits, param: str = "image") -> Upload:
    """Check what a client sent, and write it into a folder.

    Args:
        source: the bytes, or a file to read from its beginning.
        folder: where the copy goes; the caller removes it with the folder.
        limits: what it may be.
        param: the request's field, for the message.

    Returns:
        The copy.

    Raises:
        TooLargeError: for more bytes or pixels than the limits.
        RequestError: for what is no picture, is cut off, or is broken.
        OSError: where the copy cannot be written.

    Cost: reads the file once; blocks. A picture's size is read from its header before any pixel of it is made; then it
    is decoded, in memory of that many pixels, and let go.
    """
    target = Path(folder) / secrets.token_hex(16)
    with ExitStack() as undo:
        undo.callback(target.unlink, missing_ok=True)
        kind, num_bytes, head = _copy(_chunks(source), target, limits, param)
        width, height = _check_picture(target, kind, head, limits, param)
        named = target.rename(target.with_suffix(f".{kind}"))
    return Upload(path=str(named), kind=kind, num_bytes=num_bytes, width=width, height=height)


def _chunks(source: bytes | BinaryIO) -> Iterable[bytes]:
    if isinstance(source, bytes):
        return (source,)
    source.seek(0)
    return iter(lambda: source.read(_CHUNK_BYTES), b"")


def _copy(chunks: Iterable[bytes], target: Path, limits: Limits, param: str) -> tuple[PictureKind, int, bytes]:
    """Write the chunks; the kind, the number of bytes and the first of them."""
    num_bytes, head = 0, b""
    with target.open("xb") as copy:
        os.chmod(target, 0o600)
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > limits.num_bytes:
                raise TooLargeError(
                    f"{param} has more than {format_bytes(limits.num_bytes)}, the most that this server takes. "
                    "Send a smaller file.",
                    param,
                )
            if len(head) < _HEAD_BYTES:
                head = (head + chunk)[:_HEAD_BYTES]
            copy.write(chunk)
    kind = kind_of(head)
    if kind is None:
        taken = ", ".join(kind.upper() for kind in MEDIA_TYPES)
        is_what = "is of no known kind" if num_bytes else "is empty"
        raise RequestError(f"{param} {is_what}. Send one of {taken}.", param)
    return kind, num_bytes, head


def _check_picture(path: Path, kind: PictureKind, head: bytes, limits: Limits, param: str) -> tuple[int, int]:
    """Its width and height, once all of it can be decoded."""
    try:
        if kind == "webp":  # whose decoder takes the memory for all pixels as soon as it is opened
            _check_pixels(_webp_size(head), limits, param)
        with path.open("rb") as file, _opened(file, kind) as picture:
            size = picture.size
            _check_pixels(size, limits, param)
            picture.load()
        if kind == "png":
            with path.open("rb") as file:
                _require_end(file)
        return size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(
            f"{param} has far more than {limits.num_pixels} pixels, the most that this server takes. "
            "Send a smaller picture.",
            param,
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, OverflowError) as error:
        raise RequestError(
            f"{param} is a {kind.upper()} that cannot be read. It is cut off or broken: send it anew.", param
        ) from error


def _opened(file: BinaryIO, kind: PictureKind) -> ImageFile.ImageFile:
    """By the decoder of this very kind: Pillow's own choice may fall on one that is not meant here."""
    return Image.open(file, formats=[kind.upper()])


def _check_pixels(size: tuple[int, int], limits: Limits, param: str) -> None:
    width, height = size
    if width * height > limits.num_pixels:
        raise TooLargeError(
            f"{param} has {width}x{height} pixels, and this server takes {limits.num_pixels} at most. "
            "Send a smaller picture.",
            param,
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height as the first part of a WebP says."""
    part = head[12:16]
    if part == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if part == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if part == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no picture")


def _require_end(file: BinaryIO) -> None:
    """Whether a PNG has its last part: its decoder does not miss that once it has all pixels.

    Raises:
        ValueError: where it has not.
    """
    file.seek(_PNG_HEAD_BYTES)
    name = b""
    while name != b"IEND":
        header = file.read(8)
        name = header[4:8]
        file.seek(int.from_bytes(header[:4], "big"), os.SEEK_CUR)
        if len(header) < 8 or len(file.read(_PNG_SUM_BYTES)) < _PNG_SUM_BYTES:
            raise ValueError("no end")

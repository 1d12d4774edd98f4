"""What clients send is what it looks like, small enough and whole, or it is refused before a pixel of it is made."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from penstock.errors import RequestError
from penstock.server.uploads import MEDIA_TYPES, Limits, PictureKind, TooLargeError, accept, kind_of
from tests import processes

LIMITS = Limits(num_bytes=10**6, num_pixels=64 * 64)
KINDS: tuple[PictureKind, ...] = ("png", "jpeg", "webp", "gif")

BOMB = """
import resource, sys
from penstock.errors import RequestError
from penstock.server.uploads import Limits, accept
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    accept(content, sys.argv[1], Limits(num_bytes=10**8, num_pixels=4096 * 4096))
except RequestError as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def a_picture(kind: str = "png", size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    noise = Image.effect_noise(size, 80).convert(mode)
    file = io.BytesIO()
    noise.save(file, kind.upper(), **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG that says it has these pixels, in as few bytes as there can be."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", content or zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    """A WebP that says it has a canvas of these pixels."""
    extents = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    first = b"VP8X" + struct.pack("<I", 10) + bytes(4) + extents
    picture = a_picture("webp")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(first) + len(picture)) + b"WEBP" + first + picture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_file", [False, True])
def test_a_picture_is_kept_as_it_came_under_a_name_of_ours(tmp_path: Path, kind: PictureKind, is_file: bool) -> None:
    content = a_picture(kind)
    source: Any = io.BytesIO(content) if is_file else content
    if is_file:
        source.name = "../../etc/passwd"
        source.read(5)  # somebody has looked already
    upload = accept(source, tmp_path, LIMITS)
    assert (upload.kind, upload.num_bytes, upload.width, upload.height) == (kind, len(content), 64, 48)
    (path,) = tmp_path.iterdir()
    assert str(path) == upload.path and path.read_bytes() == content
    assert path.suffix == f".{kind}" and len(path.stem) == 32 and path.stat().st_mode & 0o777 == 0o600
    assert MEDIA_TYPES[upload.kind] == f"image/{kind}"


@pytest.mark.parametrize(("mode", "options"), [("L", {}), ("RGBA", {}), ("I;16", {}), ("1", {}), ("P", {})])
def test_pictures_of_every_mode_are_taken(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    assert accept(a_picture("png", mode=mode, **options), tmp_path, LIMITS).width == 64


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"lossless": False, "exact": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_every_layout_of_webp_tells_its_size_before_it_is_opened(
    tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    content = a_picture("webp", (64, 64), mode, **options)
    assert accept(content, tmp_path, LIMITS).height == 64
    larger = a_picture("webp", (65, 64), mode, **options)
    with pytest.raises(TooLargeError, match="has 65x64 pixels, and this server takes 4096"):
        accept(larger, tmp_path, LIMITS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_too_many_pixels_is_refused_with_both_numbers(tmp_path: Path, kind: str) -> None:
    with pytest.raises(TooLargeError, match="mask has 65x64 pixels, and this server takes 4096 at most") as caught:
        accept(a_picture(kind, (65, 64)), tmp_path, LIMITS, "mask")
    assert caught.value.param == "mask"
    assert not list(tmp_path.iterdir())


def test_a_file_of_too_many_bytes_is_refused_while_it_is_read(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        num_bytes = 0

        def seek(self, *_: int) -> int:
            return 0

        def read(self, size: int = -1) -> bytes:
            self.num_bytes += size
            return bytes(size)

    source = Endless()
    with pytest.raises(TooLargeError, match="image has more than 977 KiB"):
        accept(source, tmp_path, LIMITS)  # type: ignore[arg-type]
    assert source.num_bytes < 3 * 1024**2
    exact = a_picture()
    limits = Limits(num_bytes=len(exact), num_pixels=64 * 64)
    assert accept(exact, tmp_path, limits).num_bytes == len(exact)
    with pytest.raises(TooLargeError):
        accept(exact + b"x", tmp_path, limits)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path, kind: str) -> None:
    content = a_picture(kind)
    for length in (len(content) // 2, 40, 20, 13):
        with pytest.raises(RequestError, match="cut off or broken|is of no known kind"):
            accept(content[:length], tmp_path, LIMITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_no_garbled_picture_is_an_error_of_ours(tmp_path: Path, kind: str) -> None:
    content = bytearray(a_picture(kind))
    for place in range(0, len(content), max(1, len(content) // 150)):
        garbled = bytes(content[:place]) + bytes([content[place] ^ 0xFF]) + bytes(content[place + 1 :])
        try:
            accept(garbled, tmp_path, LIMITS)
        except RequestError as error:
            assert error.param == "image"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image is empty. Send one of PNG, JPEG, WEBP, GIF"),
        (b"x", "image is of no known kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of no known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "of no known kind"),
        (b"\x80\x04\x95pickle", "of no known kind"),
        (b"II*\x00" + bytes(100), "of no known kind"),
        (b"\0\0\0\x0cftypisom" + bytes(100), "of no known kind"),
        (b"\x89PNG\r\n\x1a\n" + a_picture("jpeg"), "is a PNG that cannot be read"),
        (b"RIFF\x00\x00\x00\x00WEBPJUNK" + bytes(100), "is a WEBP that cannot be read"),
        (png_of(0, 10), "is a PNG that cannot be read"),
        (png_of(10, 10), "is a PNG that cannot be read|too many"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    if content == png_of(10, 10):
        content = png_of(10, 10, b"no deflated data")
    with pytest.raises(RequestError, match=message):
        accept(content, tmp_path, LIMITS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        png_of(60_000, 60_000),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(12_000, 12_000),
        png_of(4097, 4096),
        webp_of(16_383, 16_383),
        webp_of(2**24, 2**24),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
    ],
    ids=["png 60000", "png most", "png 12000", "png 4097", "webp 16383", "webp most", "gif"],
)
def test_a_bomb_takes_no_memory(tmp_path: Path, content: bytes) -> None:
    done = processes.run([sys.executable, "-c", BOMB, str(tmp_path)], input=content, capture_output=True, check=True)
    name, grown_kib = done.stdout.split()
    assert name == b"TooLargeError" and int(grown_kib) < 16 * 1024
    assert not list(tmp_path.iterdir())


def test_texts_that_unfold_in_a_png_are_refused(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(80 * 1024**2)))
    content = png_of(1, 1, zlib.compress(bytes(4)))
    place = content.index(b"IDAT") - 4
    assert accept(content, tmp_path, LIMITS).width == 1
    with pytest.raises(RequestError, match="cannot be read"):
        accept(content[:place] + text + content[place:], tmp_path, LIMITS)


def test_a_png_without_its_end_is_cut_off_however_small(tmp_path: Path) -> None:
    content = a_picture("png", (2, 2))
    for cut in range(1, 13):
        with pytest.raises(RequestError, match="cut off or broken"):
            accept(content[:-cut], tmp_path, LIMITS)
    assert accept(content + b"what others hang on", tmp_path, LIMITS).width == 2


def test_the_kind_is_told_by_the_first_bytes_alone() -> None:
    assert [kind_of(a_picture(kind)[:32]) for kind in KINDS] == list(KINDS)
    assert kind_of(b"") is None and kind_of(b"RIFF____WAVE") is None

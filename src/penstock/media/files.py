"""A result becomes a file: the right format for its kind, written whole or not at all.

Owns paths: suffixes, numbering, the check before the work begins, and the atomic write.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.errors import OutputError
from penstock.media.pictures import write_jpeg, write_webp
from penstock.media.png import write_png
from penstock.media.video import write_video
from penstock.media.wav import write_wav
from penstock.request import GenerationResult, OutputKind

_WRITERS: dict[OutputKind, dict[str, Callable[..., None]]] = {
    "image": {".png": write_png, ".jpg": write_jpeg, ".jpeg": write_jpeg, ".webp": write_webp},
    "video": {".mp4": write_video},
    "audio": {".wav": write_wav},
}
_LOSSY = (write_jpeg, write_webp)

_MAX_NAME_BYTES = 255  # of one file name, on every common file system

SUFFIXES: dict[OutputKind, str] = {"image": ".png", "video": ".mp4", "audio": ".wav"}
"""The file format of each kind of result, where no other is asked for."""

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
}
"""What each suffix stands for."""


def suffixes(kind: OutputKind) -> tuple[str, ...]:
    """The suffixes that a kind of result can be written with."""
    return tuple(_WRITERS[kind])


def save(
    result: GenerationResult,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    quality: int | None = None,
) -> Path:
    """Write a result to a file: PNG, JPEG or WebP for a picture, MP4 for a video, WAV for a sound.

    Args:
        result: what to write.
        path: where to; its suffix must fit the result's kind. An existing file is replaced.
        metadata: written into the file beside the result's own seed and arguments; JSON-able.
        quality: of JPEG and WebP, 0 to 100; 90 where left out. The other formats have none.

    Returns:
        The path.

    Raises:
        OutputError: for a suffix that does not fit, or a place that cannot be written.

    Cost: the file appears at once when it is complete; interrupted or failed, nothing is left behind.
    """
    target = Path(path).expanduser()
    check_target(target, result.kind)
    facts = {**(metadata or {}), "seed": result.seed, "arguments": dict(result.arguments)}
    if result.frame_rate is not None:
        facts["frame_rate"] = result.frame_rate
    write = _WRITERS[result.kind][target.suffix.lower()]
    with whole_file(target.resolve()) as unfinished:  # a link keeps leading to its file
        write(result, unfinished, facts, **({"quality": quality} if write in _LOSSY else {}))
    return target


def check_target(path: Path, kind: OutputKind) -> None:
    """Refuse a path that could not be written later.

    Raises:
        OutputError: naming what is wrong with it.
    """
    if path.suffix.lower() not in suffixes(kind):
        raise OutputError(
            f"{path}: this pipeline makes {kind}s, written as {', '.join(suffixes(kind))}. Try "
            f"{path.with_suffix(SUFFIXES[kind])}."
            if path.name
            else f"{str(path)!r} names no file. Give a path that ends in {SUFFIXES[kind]}."
        )
    check_place(path)


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, whatever it holds.

    Raises:
        OutputError: naming what is wrong with it.
    """
    if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
        raise OutputError(f"{path.name[:40]}... is longer than {_MAX_NAME_BYTES} bytes. Choose a shorter name.")
    try:
        is_folder, folder = path.is_dir(), path.parent
        path.exists()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}. Choose another path.") from error
    if is_folder:
        raise OutputError(f"{path} is a folder. Give the path of a file in it.")
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder, so {path.name} cannot be written there. Make it first.")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"{path} cannot be written: no permission. Choose another path.")


def numbered(path: Path, item: int, count: int) -> Path:
    """The path of item number `item` of `count`: itself for one, `name-0.png`, `name-1.png`... for several."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{item:0{len(str(count - 1))}d}{path.suffix}")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A fresh file beside the target that takes its name when the block ends well, and is removed otherwise."""
    try:
        handle, name = tempfile.mkstemp(prefix=".penstock-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}. Choose another path.") from error
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())
        unfinished.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

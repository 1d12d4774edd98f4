"""Reads of files: exact bytes, exact counts, and one clear error for every way in which a file can fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from penstock.errors import WeightsError
from penstock.weights import reader as reader_module
from penstock.weights.memory import HostMemory
from penstock.weights.ranges import PAGE_BYTES, FileRange, align
from penstock.weights.reader import FileReader
from tests.weights.samples import file_of, opens_directly

SIZE = 10 * PAGE_BYTES + 100
UNTOUCHED = 0xAA


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return file_of(tmp_path / "model.safetensors", SIZE)


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def reader(request: pytest.FixtureRequest) -> Iterator[FileReader]:
    reader = FileReader(is_direct=request.param)
    yield reader
    reader.close()


def room(num_bytes: int) -> memoryview:
    memory = HostMemory(num_bytes)
    memory.tensor.fill_(UNTOUCHED)
    return memory.view[:num_bytes]


def limit_reads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset: real(file, [parts[0][:most]], offset))


RANGES = [(0, SIZE), (0, 0), (5, 1), (PAGE_BYTES, PAGE_BYTES), (PAGE_BYTES - 1, 2), (SIZE - 1, 1), (4097, 20_000)]


@pytest.mark.parametrize(("offset", "num_bytes"), RANGES)
def test_a_range_is_read_exactly(reader: FileReader, file: Path, offset: int, num_bytes: int) -> None:
    target = room(num_bytes + 1)
    done = reader.read(FileRange(file, offset, num_bytes), target[:num_bytes])
    assert bytes(target[:num_bytes]) == file.read_bytes()[offset : offset + num_bytes]
    assert target[num_bytes] == UNTOUCHED
    assert done == reader.read_bytes >= num_bytes
    assert done <= align(num_bytes, PAGE_BYTES) + PAGE_BYTES


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("offset", "num_bytes"), [(0, SIZE), (5, 1), (PAGE_BYTES - 1, 2), (4097, 20_000)])
def test_every_read_is_direct_where_the_file_system_has_such(
    file: Path, offset: int, num_bytes: int, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pieces, heads of pieces and what is cast as well, whatever memory they are read to."""
    if not opens_directly(file):
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr(reader_module, "_THROUGH_BYTES", 2 * PAGE_BYTES)
    reader = FileReader(is_direct=True)
    target = room(num_bytes + shift)[shift:]
    reader.read(FileRange(file, offset, num_bytes), target)
    assert bytes(target) == file.read_bytes()[offset : offset + num_bytes]
    assert reader.cached_bytes == 0
    reader.close()


@pytest.mark.parametrize(("offset", "num_bytes"), RANGES)
def test_margins_make_a_read_direct(file: Path, offset: int, num_bytes: int) -> None:
    reader = FileReader(is_direct=True)
    margin = (offset % PAGE_BYTES, -(offset + num_bytes) % PAGE_BYTES)
    target = room(margin[0] + num_bytes + margin[1])
    done = reader.read(FileRange(file, offset, num_bytes), target, margin)
    whole = min(align(offset + num_bytes, PAGE_BYTES), SIZE) - (offset - margin[0])
    assert done == reader.read_bytes == (whole if opens_directly(file) and num_bytes else num_bytes)
    assert bytes(target[margin[0] :][:num_bytes]) == file.read_bytes()[offset : offset + num_bytes]
    reader.close()


def test_a_buffered_read_leaves_the_margins_alone(file: Path) -> None:
    reader = FileReader()
    target = room(PAGE_BYTES)
    assert reader.read(FileRange(file, 100, 200), target, (100, PAGE_BYTES - 300)) == 200
    assert set(target[:100]) == set(target[300:]) == {UNTOUCHED}
    assert bytes(target[100:300]) == file.read_bytes()[100:300]
    reader.close()


@pytest.mark.parametrize("shift", [1, 64, 256])
def test_whole_pages_are_read_to_any_address(reader: FileReader, file: Path, shift: int) -> None:
    target = room(3 * PAGE_BYTES)[shift : shift + 2 * PAGE_BYTES]
    assert reader.read(FileRange(file, PAGE_BYTES, 2 * PAGE_BYTES), target) == 2 * PAGE_BYTES
    assert bytes(target) == file.read_bytes()[PAGE_BYTES : 3 * PAGE_BYTES]


def test_a_file_system_without_direct_reads_is_read_in_the_usual_way(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, real = getattr(os, "O_DIRECT", 0), os.open

    def refuse(path: Path, flags: int) -> int:
        if direct and flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    reader = FileReader(is_direct=True)
    target = room(PAGE_BYTES)
    assert reader.read(FileRange(file, 8, 16), target, (8, PAGE_BYTES - 24)) == 16
    assert bytes(target[8:24]) == file.read_bytes()[8:24]
    assert reader.cached_bytes == reader.read_bytes == 16  # asked for, and said that it was not so
    reader.close()
    usual = FileReader()
    usual.read(FileRange(file, 8, 16), room(16))
    assert usual.cached_bytes == 0  # nobody asked
    usual.close()


@pytest.mark.parametrize("most", [1000, PAGE_BYTES, 3 * PAGE_BYTES])
def test_short_reads_go_on(reader: FileReader, file: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_reads(monkeypatch, most)
    target = room(align(SIZE, PAGE_BYTES))
    assert reader.read(FileRange(file, 0, SIZE), target, (0, -SIZE % PAGE_BYTES)) == SIZE
    assert bytes(target[:SIZE]) == file.read_bytes()


@pytest.mark.parametrize("margin", [(0, 0), (0, -(SIZE + 1) % PAGE_BYTES)])
def test_a_file_that_is_too_short_says_where_it_ends(reader: FileReader, file: Path, margin: tuple[int, int]) -> None:
    target = room(SIZE + 1 + margin[1])
    with pytest.raises(WeightsError, match=rf"model\.safetensors: ends at byte {SIZE}, 1 bytes too soon"):
        reader.read(FileRange(file, 0, SIZE + 1), target, margin)
    assert reader.read_bytes == 0


def test_a_missing_file_cannot_be_opened(reader: FileReader, tmp_path: Path) -> None:
    place = FileRange(tmp_path / "gone.safetensors", 0, 1)
    for ask in (lambda: reader.open(place.file), lambda: reader.check(place.file), lambda: reader.read(place, room(1))):
        with pytest.raises(WeightsError, match=r"gone\.safetensors: cannot be read: No such file"):
            ask()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_an_error_of_the_file(
    reader: FileReader, file: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(WeightsError, match=rf"model\.safetensors: cannot be read: {os.strerror(number)}"):
        reader.read(FileRange(file, 0, PAGE_BYTES), room(PAGE_BYTES))
    assert reader.read_bytes == 0


def truncate(file: Path) -> None:
    os.truncate(file, SIZE - 1)


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def replace(file: Path) -> None:
    state = file.stat()
    other = file_of(file.with_name("other"), SIZE)
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, rf"changed while its weights are streamed \({SIZE} bytes before, {SIZE - 1} now\)"),
        (touch, rf"changed while its weights are streamed \({SIZE} bytes before, {SIZE} now\)"),
        (replace, r"changed while its weights are streamed .* Load the pipeline again"),
        (Path.unlink, r"vanished while its weights are streamed \(No such file"),
    ],
)
def test_a_file_that_is_not_the_one_opened_is_refused(
    reader: FileReader, file: Path, change: Callable[[Path], None], message: str
) -> None:
    reader.open(file)
    reader.check(file)
    change(file)
    with pytest.raises(WeightsError, match=rf"model\.safetensors: {message}"):
        reader.check(file)


@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_what_was_opened_stays_readable(reader: FileReader, file: Path, change: Callable[[Path], None]) -> None:
    """The bytes are those of the file that was opened, directly and not, whatever has its name now."""
    whole = file.read_bytes()
    reader.open(file)
    change(file)
    for offset, num_bytes in ((0, PAGE_BYTES), (3, 5)):
        target = room(num_bytes)
        reader.read(FileRange(file, offset, num_bytes), target)
        assert bytes(target) == whole[offset : offset + num_bytes]


def test_threads_share_a_reader(reader: FileReader, tmp_path: Path) -> None:
    files = [file_of(tmp_path / f"{number}.safetensors", SIZE, number) for number in range(3)]
    random = Random(0)
    places = []
    for _ in range(200):
        offset = random.randrange(SIZE)
        places.append(FileRange(random.choice(files), offset, random.randint(1, SIZE - offset)))

    def read(place: FileRange) -> bytes:
        target = room(place.num_bytes)
        reader.read(place, target)
        return bytes(target)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, places))
    whole = {file: file.read_bytes() for file in files}
    assert found == [whole[place.file][place.offset : place.offset + place.num_bytes] for place in places]
    assert sum(place.num_bytes for place in places) <= reader.read_bytes
    if not reader._is_direct:
        assert reader.read_bytes == sum(place.num_bytes for place in places)


def test_close_leaves_no_file_open_and_a_later_read_opens_it_anew(reader: FileReader, file: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    reader.read(FileRange(file, 0, PAGE_BYTES), room(PAGE_BYTES))
    reader.open(file)
    assert len(os.listdir("/dev/fd")) > before
    reader.close()
    reader.close()
    assert len(os.listdir("/dev/fd")) == before
    touch(file)
    reader.check(file)

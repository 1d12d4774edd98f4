"""Files are kept whole or not at all, in a folder, in a bucket and in memory, and come back whole or in part."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.server.files import FileRangeError, Files, StorageError
from tests import processes
from tests.server.s3 import client

PUT = """
import asyncio, sys
from penstock.server.files import Files
print("begun", flush=True)
asyncio.run(Files(sys.argv[1]).put(sys.argv[2], "video/mp4"))
"""
LIMITED = """
import asyncio, os, resource, sys
from penstock.server.files import Files
async def main():
    files = Files(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = await files.put(sys.argv[2], "video/mp4")
    size, chunks = await files.get(name)
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        if sys.argv[1].startswith("s3:"):  # the server of the tests reads the file anew for each part
            total = size
            break
    print(size, total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
    os._exit(0)  # a thread of obstore's that still lets go of something would abort an interpreter that ends
asyncio.run(main())
"""


@pytest.fixture(params=["file", "s3", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"file://{tmp_path}/some%20files" if request.param == "file" else "memory:"


async def content(files: Files, name: str, start: int | None = None, end: int | None = None) -> bytes:
    size, chunks = await files.get(name, start, end)
    assert size > 0
    return b"".join([chunk async for chunk in chunks])


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def a_source(folder: Path, num_bytes: int) -> Path:
    path = folder / "source"
    path.write_bytes(os.urandom(num_bytes))
    return path


@pytest.mark.parametrize("num_bytes", [1, 4 * 1024**2, 4 * 1024**2 + 1, 20 * 1024**2 + 3])
def test_a_file_comes_back_whole_and_in_parts(url: str, tmp_path: Path, num_bytes: int) -> None:
    async def work() -> None:
        files, source = Files(url), a_source(tmp_path, num_bytes)
        whole = source.read_bytes()
        name = await files.put(source, "image/png")
        assert re.fullmatch(r"[0-9a-f]{32}\.png", name)
        assert await content(files, name) == whole
        assert await content(files, name, start=num_bytes - 1) == whole[-1:]
        assert await content(files, name, start=0, end=1) == whole[:1]
        assert await content(files, name, start=num_bytes // 2, end=10**12) == whole[num_bytes // 2 :]
        assert await content(files, name, start=num_bytes // 3, end=num_bytes // 3 + 1) == whole[num_bytes // 3 :][:1]
        assert (await files.get(name, 0, 1))[0] == num_bytes
        await files.delete(name)
        await files.delete(name)
        with pytest.raises(FileNotFoundError, match="it has expired"):
            await files.get(name)

    run(work)


def test_an_empty_file_has_no_range(url: str, tmp_path: Path) -> None:
    async def work() -> None:
        files = Files(url)
        name = await files.put(a_source(tmp_path, 0), "text/unknown")
        assert name.endswith(".bin")
        size, chunks = await files.get(name)
        assert size == 0 and [chunk async for chunk in chunks] == []
        with pytest.raises(FileRangeError):
            await files.get(name, 0)

    run(work)


@pytest.mark.parametrize(("start", "end"), [(10, None), (11, 12), (5, 5), (7, 3), (-1, None), (0, 0)])
def test_a_range_that_a_file_does_not_have_is_refused_with_its_size(
    url: str, tmp_path: Path, start: int, end: int | None
) -> None:
    async def work() -> None:
        files = Files(url)
        name = await files.put(a_source(tmp_path, 10), "image/webp")
        with pytest.raises(FileRangeError, match="a file of 10 bytes") as caught:
            await files.get(name, start, end)
        assert caught.value.size == 10

    run(work)


@pytest.mark.parametrize(
    "name", ["", "../source", "/etc/passwd", "a" * 32 + "/../../source", "\x00", "\ud800", "A" * 32]
)
def test_a_name_that_is_none_never_reaches_the_storage(url: str, tmp_path: Path, name: str) -> None:
    async def work() -> None:
        source = a_source(tmp_path, 3)
        files = Files(url)
        with pytest.raises(FileNotFoundError):
            await files.get(name)
        await files.delete(name)
        assert source.is_file()

    run(work)


def test_a_storage_that_works_is_left_as_it_was(url: str, tmp_path: Path) -> None:
    run(Files(url).check)
    folder = tmp_path / "some files"
    assert not folder.exists() or not list(folder.iterdir())


def test_the_name_is_told_before_the_file_is_there(url: str, tmp_path: Path) -> None:
    async def work() -> None:
        begun: list[str] = []
        files = Files(url, begin=begun.append)
        name = await files.put(a_source(tmp_path, 3), "image/jpeg")
        assert begun == [name] and name.endswith(".jpg")

        def refuse(_: str) -> None:
            raise StorageError("the database is away")

        with pytest.raises(StorageError, match="the database is away"):
            await Files(url, begin=refuse).put(a_source(tmp_path, 3), "image/jpeg")

    run(work)


def test_a_file_that_is_not_whole_is_abandoned(url: str, tmp_path: Path) -> None:
    async def work() -> None:
        begun: list[str] = []
        abandoned: list[str] = []
        files = Files(url, begin=begun.append, abandon=abandoned.append)
        await files.put(a_source(tmp_path, 3), "image/png")
        assert abandoned == []
        with pytest.raises(StorageError):
            await files.put(tmp_path / "gone", "image/png")
        assert abandoned == begun[1:]

    run(work)


def test_a_source_that_is_gone_is_a_failure_of_the_storage(url: str, tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(StorageError, match="failed: No such file"):
            await Files(url).put(tmp_path / "gone", "image/png")

    run(work)


def test_a_cancelled_file_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "files"

    def whole() -> list[Path]:
        return [path for path in folder.iterdir() if "#" not in path.name]

    async def cancelled_while_written(files: Files, source: Path) -> bool:
        """Whether it came in time: a file may be whole before anybody looks."""
        putting = asyncio.ensure_future(files.put(source, "video/mp4"))
        while not list(folder.iterdir()) and not putting.done():
            await asyncio.sleep(0)
        putting.cancel()
        await asyncio.wait([putting])
        return putting.cancelled() and not whole()

    async def work() -> None:
        files, source = Files(f"file://{folder}"), a_source(tmp_path, 64 * 1024**2)
        for _ in range(20):
            if await cancelled_while_written(files, source):
                break
            for path in whole():
                path.unlink()
        else:
            pytest.fail("no file was cancelled while it was written")
        async with asyncio.timeout(20):
            while list(folder.iterdir()):
                await asyncio.sleep(0.01)

    run(work)


def test_a_server_killed_while_it_writes_leaves_no_file_that_can_be_had(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    source = a_source(tmp_path, 256 * 1024**2)
    command = [sys.executable, "-c", PUT, f"file://{folder}", str(source)]
    with processes.Process[str](command, stdout=processes.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while not folder.is_dir() or not list(folder.iterdir()):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (left,) = folder.iterdir()
    assert "#" in left.name and left.stat().st_size < source.stat().st_size

    async def work() -> None:
        files = Files(f"file://{folder}")
        with pytest.raises(FileNotFoundError):
            await files.get(left.name.partition("#")[0])
        with pytest.raises(FileNotFoundError):
            await files.get(left.name)
        await files.check()
        assert left.is_file()  # another server may be at it
        long_ago = time.time() - 7200
        os.utime(left, (long_ago, long_ago))
        other = folder / "of somebody else#1"
        other.touch()
        os.utime(other, (long_ago, long_ago))
        assert await files.remove_leftovers() == 1
        assert list(folder.iterdir()) == [other]

    run(work)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_large_file_is_never_whole_in_memory(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    place = f"file://{tmp_path}/files" if kind == "file" else request.getfixturevalue("s3_url")
    num_bytes = 160 * 1024**2 + 1
    source = tmp_path / "source"
    with source.open("wb") as sparse:
        sparse.truncate(num_bytes)
    done = processes.run(
        [sys.executable, "-c", LIMITED, place, str(source)], capture_output=True, text=True, check=True
    )
    size, total, grown_kib = map(int, done.stdout.split())
    assert size == total == num_bytes
    assert grown_kib < 80 * 1024


def test_a_file_that_goes_away_while_it_is_read_is_an_error(url: str, tmp_path: Path) -> None:
    async def work() -> None:
        files = Files(url)
        name = await files.put(a_source(tmp_path, 9 * 1024**2), "video/mp4")
        _, chunks = await files.get(name)
        assert len(await anext(chunks)) == 4 * 1024**2
        await files.delete(name)
        with pytest.raises(StorageError):
            await anext(chunks)

    run(work)


def test_a_bucket_knows_the_media_type_and_the_prefix(s3_url: str, s3_endpoint: str, tmp_path: Path) -> None:
    async def work() -> None:
        name = await Files(s3_url).put(a_source(tmp_path, 3), "image/webp")
        bucket = s3_url.split("/")[2]
        found = client(s3_endpoint).head_object(Bucket=bucket, Key=f"some/prefix/{name}")  # type: ignore[attr-defined]
        assert found["ContentType"] == "image/webp" and found["ContentLength"] == 3

    run(work)


def test_a_bucket_that_is_not_there_is_refused_without_the_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="s3://no-such-bucket cannot be used") as caught:
        run(Files("s3://no-such-bucket").check)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="cannot be used"):
        run(Files(s3_url).check)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be made"):
            Files(f"file://{place}")
    files = Files(f"file://{tmp_path}/files")
    (tmp_path / "files").rmdir()
    (tmp_path / "files").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        run(files.check)


@pytest.mark.parametrize(
    "url",
    ["", "folder", "file:folder", "file://host/folder", "s3://", "gs://bucket", "memory://place", "s3://key:hunter2@b"],
)
def test_a_url_that_is_no_place_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no place for files. Give file:///folder, s3://bucket/prefix") as caught:
        Files(url)
    assert "hunter2" not in str(caught.value)


def test_reading_and_writing_do_not_block_the_loop(tmp_path: Path) -> None:
    main = threading.get_ident()

    async def work() -> None:
        files = Files(f"file://{tmp_path}/files", begin=lambda _: threads.append(threading.get_ident()))
        putting = asyncio.ensure_future(files.put(a_source(tmp_path, 64 * 1024**2), "video/mp4"))
        turns = 0
        while not putting.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 10

    threads: list[int] = []
    run(work)
    assert threads and main not in threads

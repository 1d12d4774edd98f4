"""Files over HTTP: whole, in parts, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from penstock.server.files import StorageError
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("contents")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client


@pytest.fixture(scope="module")
def url(http: httpx2.Client) -> str:
    body = {"prompt": "x", "response_format": "url", "seed": 1}
    return str(http.post("/v1/images/generations", json=body).json()["data"][0]["url"])


def test_a_whole_file(http: httpx2.Client, url: str) -> None:
    answer = http.get(url)
    assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
    headers = answer.headers
    assert headers["content-length"] == str(len(answer.content)) and headers["accept-ranges"] == "bytes"
    assert headers["content-disposition"].startswith("inline") and headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"] and "immutable" in headers["cache-control"]
    assert Path(url).name not in headers["etag"]
    head = http.head(url)
    assert (
        head.status_code == 200 and head.content == b"" and head.headers["content-length"] == headers["content-length"]
    )


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=5-5", 5, 6),
        ("bytes=20-", 20, None),
        ("bytes=-7", -7, None),
        ("bytes=1-99999", 1, None),
    ],
)
def test_a_part(http: httpx2.Client, url: str, asked: str, first: int, last: int | None) -> None:
    whole = http.get(url).content
    answer = http.get(url, headers={"range": asked})
    assert answer.status_code == 206 and answer.content == whole[first:last]
    begin = first % len(whole)
    assert answer.headers["content-range"] == f"bytes {begin}-{begin + len(answer.content) - 1}/{len(whole)}"


@pytest.mark.parametrize(
    "asked", ["bytes=999999-", "bytes=-0", "bytes=99999999999999999999999-", f"bytes={'9' * 5000}-"]
)
def test_a_part_that_is_not_there(http: httpx2.Client, url: str, asked: str) -> None:
    answer = http.get(url, headers={"range": asked})
    assert answer.status_code == 416 and answer.json()["error"]["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(http.get(url).content)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "bytes=9-3", "bytes=-", "lines=0-1", "bytes=a-b"])
def test_what_is_no_single_range_gets_the_whole(http: httpx2.Client, url: str, asked: str) -> None:
    assert http.get(url, headers={"range": asked}).status_code == 200


def test_conditions(http: httpx2.Client, url: str) -> None:
    tag = http.get(url).headers["etag"]
    for known in (tag, f'W/{tag}, "x"', "*"):
        assert http.get(url, headers={"if-none-match": known}).status_code == 304
    assert http.get(url, headers={"if-none-match": '"x"'}).status_code == 200
    assert http.get(url, headers={"range": "bytes=0-1", "if-range": tag}).status_code == 206
    assert http.get(url, headers={"range": "bytes=0-1", "if-range": '"x"'}).status_code == 200


@pytest.mark.parametrize("name", ["0" * 32 + ".png", "..%2F..%2Fjobs.db", "jobs.db", "%00", "a" * 5000])
def test_what_is_no_file(http: httpx2.Client, name: str) -> None:
    answer = http.get(f"/v1/files/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_nothing_is_unchanged_that_is_not_there(http: httpx2.Client) -> None:
    for name in ("0" * 32 + ".png", "jobs.db"):
        answer = http.get(f"/v1/files/{name}", headers={"if-none-match": "*"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


def test_a_part_of_numbers_that_are_long(http: httpx2.Client, url: str) -> None:
    whole = http.get(url).content
    for asked in (f"bytes=-{'9' * 5000}", f"bytes=0-{'9' * 5000}", f"bytes={'0' * 5000}-"):
        answer = http.get(url, headers={"range": asked})
        assert answer.status_code == 206 and answer.content == whole


def test_a_storage_that_fails(live: Live, http: httpx2.Client, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(name: str, start: int | None = None, end: int | None = None) -> None:
        raise StorageError("s3://secret is away")

    monkeypatch.setattr(live.files, "get", failing)
    answer = http.get(url)
    assert answer.status_code == 503 and answer.headers["retry-after"] and "secret" not in answer.text

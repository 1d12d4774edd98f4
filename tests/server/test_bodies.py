"""Bodies are read whole, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from penstock.server import failures
from penstock.server.bodies import FORM, JSON, reading
from penstock.server.schemas import ImageAsk

BOUNDARY = "b" * 20
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    app = FastAPI()
    failures.install(app)

    @app.post("/any")
    async def both(request: Request) -> dict[str, Any]:
        async with reading(request, JSON, FORM) as body:
            sizes = {name: [len(await file.read()) for file in files] for name, files in body.files.items()}
            return {"values": body.values, "files": sizes, "is_form": body.is_form}

    @app.post("/fields")
    async def fields(request: Request) -> dict[str, Any]:
        async with reading(request, JSON, FORM) as body:
            return body.fields(ImageAsk).model_dump(exclude_none=True)

    @app.post("/json")
    async def only_json(request: Request) -> dict[str, Any]:
        async with reading(request, JSON) as body:
            return body.values

    with TestClient(app) as client:
        yield client


def form(*parts: bytes, end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts) + (
        b"--" + BOUNDARY.encode() + end
    )


def field(name: str, value: bytes, filename: str | None = None) -> bytes:
    more = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


def test_what_lies_too_deep_is_refused(http: TestClient) -> None:
    for depth, status in ((20, 200), (40, 400), (900, 400), (100_000, 400)):
        data = b'{"attention_kwargs": ' + b"[" * depth + b"]" * depth + b"}"
        answer = http.post("/fields", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == status, depth
        assert status == 200 or answer.json()["error"]["code"] == "malformed_body"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": 1',
        b'{"a": NaN}',
        b"[1]",
        b'"text"',
        b"null",
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
)
def test_malformed_json(http: TestClient, data: bytes) -> None:
    answer = http.post("/any", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "malformed_body"


def test_names_that_come_twice(http: TestClient) -> None:
    for data in ('{"seed": 1, "more": 3, "seed": 2}', '{"more": 3, "a": {"seed": [], "b": 1, "seed": []}}'):
        answer = http.post("/any", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "seed" and "given twice" in answer.json()["error"]["message"]


def test_large_json_is_read_in_a_thread_alike(http: TestClient) -> None:
    answer = http.post("/any", json={"a": "x" * 600_000})
    assert len(answer.json()["values"]["a"]) == 600_000


def test_form(http: TestClient) -> None:
    data = form(field("prompt", "rot \u00fc".encode()), field("image[]", b"1", "a.png"), field("image[]", b"22", "b"))
    answer = http.post("/any", content=data, headers={"content-type": TYPE})
    assert answer.json() == {"values": {"prompt": "rot \u00fc"}, "files": {"image[]": [1, 2]}, "is_form": True}


@pytest.mark.parametrize(
    "data",
    [
        form(field("prompt", b"x"), field("image", b"1234", "a.png"), end=b"")[: -len(BOUNDARY) - 6],  # within the file
        form(field("prompt", b"x"), end=b"\r\n"),  # where another part should begin
        b"no boundary at all",
        form(b"Content-Disposition: form-data\r\n\r\nx"),
        form(field("prompt", b"x" * 2_000_000)),
        form(*[field(f"f{number}", b"x") for number in range(300)]),
    ],
)
def test_malformed_forms(http: TestClient, data: bytes) -> None:
    answer = http.post("/any", content=data, headers={"content-type": TYPE})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "malformed_body"


def test_one_value_per_field(http: TestClient) -> None:
    answer = http.post("/any", content=form(field("n", b"1"), field("n", b"2")), headers={"content-type": TYPE})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/mixed; boundary=x", ""])
def test_other_types(http: TestClient, kind: str) -> None:
    answer = http.post("/any", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"


def test_json_where_nothing_is_said(http: TestClient) -> None:
    request = http.build_request("POST", "/json", content=b'{"a": 1}')
    request.headers.pop("content-type", None)
    assert http.send(request).json() == {"a": 1}
    assert http.post("/json", content=form(field("a", b"1")), headers={"content-type": TYPE}).status_code == 415


def test_json_is_strict_and_forms_are_texts(http: TestClient) -> None:
    assert http.post("/fields", json={"n": "2"}).json()["error"]["param"] == "n"
    assert http.post("/fields", json={"stream": "true"}).json()["error"]["param"] == "stream"
    assert http.post("/fields", json={"n": 2, "user": None}).json() == {"n": 2}
    data = form(field("n", b"2"), field("stream", b"true"), field("strength", b"0.5"))
    answer = http.post("/fields", content=data, headers={"content-type": TYPE})
    assert answer.json() == {"n": 2, "stream": True, "strength": "0.5"}

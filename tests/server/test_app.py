"""The application as a whole: limits, errors and what it does not do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from penstock.server.jobs import Jobs
from tests.server.engine_double import EngineDouble
from tests.server.live import Live, parts, serving


def test_unknown_routes_and_methods_are_in_the_envelope(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        missing, wrong = http.get("/v1/chat/completions"), http.put("/v1/jobs/image_1")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
        assert wrong.status_code == 405 and wrong.headers["allow"] == "DELETE, GET"
        assert "DELETE, GET" in wrong.json()["error"]["message"]
        for path in ("/docs", "/redoc"):
            assert http.get(path).status_code == 404


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read(tmp_path: Path, is_chunked: bool) -> None:
    with serving(tmp_path, max_upload="100KiB") as live, live.client() as http:
        body = b'{"prompt": "' + b"x" * 200_000 + b'"}'
        content = iter([body[:1000], body[1000:]]) if is_chunked else body
        answer = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "100KiB" in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["code"] == "request_too_large"
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/videos/sync"])
def test_a_full_queue_is_told_before_the_body_is_read(tmp_path: Path, path: str) -> None:
    kind = "image" if "images" in path else "video"
    with serving(tmp_path, EngineDouble(kind, accepts_image=True, max_queue=0)) as live:
        address = ("127.0.0.1", int(live.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: 1000\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 429")


def test_a_defect_is_an_answer_and_a_traceback_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Jobs, *arguments: object, **more: object) -> None:
        raise ZeroDivisionError("secret of the server")

    with serving(tmp_path) as live, live.client() as http:
        monkeypatch.setattr(Jobs, "get", broken)
        answer = http.get("/v1/jobs/image_1")
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert http.get("/health").status_code == 200


def test_while_the_model_is_loaded(tmp_path: Path) -> None:
    engine = EngineDouble()
    engine.description, engine.state = None, "starting"
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x"})
        assert (
            answer.status_code == 503
            and answer.headers["retry-after"]
            and answer.json()["error"]["code"] == "not_ready"
        )
        assert http.get("/v1/models").json()["data"][0]["kind"] is None


def test_slow_and_broken_connections_hold_nobody_up(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        port = int(live.url.rpartition(":")[2])
        begun = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        try:
            for number, one in enumerate(begun):
                one.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n")
                if number % 2:
                    one.sendall(b'content-type: application/json\r\n\r\n{"prompt": "x')
            assert http.get("/health").status_code == 200
            assert http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 200
        finally:
            for one in begun:
                one.close()
        assert http.get("/health").status_code == 200
        assert len(live.engine.orders) == 1


def test_many_at_once_get_their_own_pictures(tmp_path: Path) -> None:
    with serving(tmp_path, EngineDouble(max_queue=5)) as live:
        found: list[tuple[int, int, int | None]] = []

        def ask(seed: int) -> None:
            with live.client() as http:
                answer = http.post("/v1/images/generations", json={"prompt": "x", "seed": seed})
                items = answer.json().get("data", [{}])
                found.append((answer.status_code, seed, items[0].get("seed")))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 40 and {status for status, _, _ in found} <= {200, 429}
    assert all(seed == got for status, seed, got in found if status == 200)
    assert sum(status == 200 for status, _, _ in found) >= 5


def test_the_event_loop_does_not_wait_for_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, EngineDouble("video")) as live, live.client() as http:
        going_on, create = threading.Event(), live.store.create
        monkeypatch.setattr(live.store, "create", lambda job: going_on.wait(30) and create(job))
        answers = []

        def ask() -> None:
            with live.client() as other:
                answers.append(other.post("/v1/videos", json={"prompt": "x"}).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        while not live.engine.orders:
            time.sleep(0.01)
        assert http.get("/health").status_code == 200 and not answers
        going_on.set()
        thread.join(30)
        assert answers == [200]


def test_a_restart_keeps_what_was_made(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        made = http.post("/v1/images/generations", json={"prompt": "x", "response_format": "url"}).json()
    with serving(tmp_path) as live, live.client() as http:
        job = http.get(f"/v1/jobs/{made['job_id']}").json()
        assert job["status"] == "completed" and http.get(f"/v1/files/{job['files'][0]['name']}").status_code == 200


def test_the_lifespan_closes_the_engine(tmp_path: Path) -> None:
    engine = EngineDouble()
    app, store, _, _ = parts(tmp_path, engine)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            assert not engine.is_closed

    asyncio.run(main())
    store.close()
    assert engine.is_closed


def test_no_key_is_in_any_answer_of_the_operations(tmp_path: Path) -> None:
    secrets = {"api_key": ["sk-very-secret"], "database": "", "storage": ""}
    with serving(tmp_path, **secrets) as live, live.client("sk-very-secret") as http:
        for path in ("/v1/config", "/health", "/metrics", "/openapi.json", "/v1/models"):
            assert "sk-very-secret" not in http.get(path).text
        assert json.loads(http.get("/v1/config").text)["server"]["api_key"] == "1 keys"


def headers_of(live: Live, path: str) -> dict[str, str]:
    with live.client() as http:
        return dict(http.get(path).headers)


def test_the_page_is_there(tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        assert headers_of(live, "/")["content-type"].startswith("text/html")

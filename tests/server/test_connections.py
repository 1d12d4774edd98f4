"""Connections that nobody uses are closed, and a server without descriptors comes back, saying so once."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from penstock.server import connections, limits
from penstock.server.connections import Complaints, raise_limit
from tests.server.live import Live, serving
from tests.server.test_process import process

FILE_BYTES = 2**25
HEAD = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"


@contextmanager
def sockets(url: str, count: int) -> Iterator[list[socket.socket]]:
    host, _, port = url.removeprefix("http://").partition(":")
    opened = [socket.create_connection((host, int(port)), timeout=20) for _ in range(count)]
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    with serving(tmp_path) as found:
        yield found


def all_of(one: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: one.recv(2**16), b""))


def test_what_never_asks_is_closed(live: Live) -> None:
    begun_s = time.monotonic()
    with sockets(live.url, 3) as (silent, half, slow):
        half.sendall(HEAD)
        slow.sendall(HEAD)
        time.sleep(0.3)
        slow.sendall(b"x-one: 1\r\n")  # which gains it no time
        assert [all_of(one) for one in (silent, half, slow)] == [b"", b"", b""]
    assert 0.4 < time.monotonic() - begun_s < 10


def test_half_a_second_request_is_closed_as_well(live: Live) -> None:
    with sockets(live.url, 1) as (one,):
        one.sendall(HEAD + b"\r\n")
        assert one.recv(2**16).startswith(b"HTTP/1.1 200")
        one.sendall(HEAD)
        all_of(one)


def test_a_request_under_way_is_left_alone(live: Live) -> None:
    live.engine.gate.clear()
    with sockets(live.url, 1) as (one,):
        body = b'{"prompt": "x"}'
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        one.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body[:3])
        time.sleep(0.7)
        one.sendall(body[3:])
        time.sleep(0.7)
        live.engine.gate.set()
        assert one.recv(2**16).startswith(b"HTTP/1.1 200")
        time.sleep(0.7)
        one.sendall(HEAD + b"connection: close\r\n\r\n")  # between two requests it is uvicorn that waits
        assert b"HTTP/1.1 200" in all_of(one)


def test_a_body_that_stops_half_way_ends_its_connection(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.2)
    head = b"POST /v1/%s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 90\r\ncontent-type: %s\r\n\r\n"
    begun_s = time.monotonic()
    with sockets(live.url, 2) as (json, form):
        json.sendall(head % (b"images/generations", b"application/json") + b'{"prompt"')
        form.sendall(head % (b"images/edits", b"multipart/form-data; boundary=x") + b"--x\r\n")
        for one in (json, form):
            answer = all_of(one)
            assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
    assert time.monotonic() - begun_s < 8  # nobody waits for the rest


@pytest.fixture
def download(live: Live) -> bytes:
    """A request for a file that is more than what the system keeps on the way."""
    (live.spool.parent / "files" / f"{'a' * 32}.mp4").write_bytes(bytes(FILE_BYTES))
    return b"GET /v1/files/%s.mp4 HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n" % (b"a" * 32)


def test_an_answer_that_nobody_reads_is_given_up(live: Live, download: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_S", 0.3)
    with sockets(live.url, 1) as (one,):
        one.sendall(download)
        time.sleep(1.5)
        assert len(all_of(one)) < FILE_BYTES


def test_a_slow_reader_gets_all(live: Live, download: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_S", 1.0)
    num_bytes, begun_s = 0, time.monotonic()
    with sockets(live.url, 1) as (one,):
        one.sendall(download)
        while part := one.recv(2**20):
            num_bytes += len(part)
            time.sleep(0.05)
    assert num_bytes > FILE_BYTES and time.monotonic() - begun_s > 1.0


def test_what_is_no_http_is_answered_in_the_envelope(live: Live) -> None:
    with sockets(live.url, 2) as (one, other):
        one.sendall(b"NOT HTTP\r\n\r\n")
        answer = all_of(one)
        assert answer.startswith(b"HTTP/1.1 400") and b'{"error":{"message":' in answer and b"malformed_http" in answer
        other.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\nnot a chunk\r\n")
        assert all_of(other).startswith(b"HTTP/1.1 ")


def test_many_that_never_ask_do_not_keep_others_out(tmp_path: Path) -> None:
    with process(tmp_path, "narrow") as (_, url), sockets(url, 290):  # of 256 descriptors
        with httpx2.Client(base_url=url, timeout=30) as http:
            assert http.get("/health").status_code == 200
        log = (tmp_path / "log").read_text()
    assert log.count("no more connections can be taken") == 1 and "Traceback" not in log and "accept()" not in log


def test_too_few_descriptors_are_told_of_once_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now_s[0])
    loop, tell = asyncio.new_event_loop(), Complaints()
    try:
        for _ in range(5):
            tell(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
        assert capsys.readouterr().out.count("no more connections") == 1
        now_s[0] += 61
        tell(loop, {"message": "accept", "exception": OSError(errno.ENFILE, "Too many open files")})
        assert capsys.readouterr().out.count("no more connections") == 1
        with caplog.at_level(logging.ERROR, "asyncio"):
            tell(loop, {"message": "something else"})
        assert "something else" in caplog.text
    finally:
        loop.close()


def test_all_descriptors_that_may_be_had_are_taken() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


BODY = b'{"prompt": "x"}'
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("count", [1, 2])
def test_a_client_that_closes_its_half_gets_its_answers(live: Live, count: int) -> None:
    live.engine.gate.clear()
    with sockets(live.url, 1) as (one,):
        one.sendall(count * (POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY))
        one.shutdown(socket.SHUT_WR)
        assert one.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"  # it waits, and is told so
        live.engine.gate.set()
        assert all_of(one).count(b"HTTP/1.1 200 OK") == count


def test_a_client_that_leaves_while_it_waits_is_noticed(live: Live) -> None:
    live.engine.gate.clear()
    with sockets(live.url, 1) as (one,):
        one.sendall(POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
        await_that(lambda: bool(live.engine.orders))
    await_that(lambda: live.app.state.service.jobs.num_unfinished == 0)
    job = live.store.get(live.engine.orders[0].id)
    assert job is not None and job.error_code == "cancelled"


def test_two_lengths_of_a_body_are_refused(live: Live) -> None:
    with sockets(live.url, 1) as (one,):
        one.sendall(POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
        said = all_of(one)  # and the connection is closed
    assert said.startswith(b"HTTP/1.1 400") and b"Transfer-Encoding" in said and live.engine.orders == []


def await_that(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)

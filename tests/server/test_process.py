"""The server as a process: its start, its signals, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from penstock.errors import ConfigError
from penstock.server.process import Server, address_of, bind, data_folder, run, server_name
from penstock.server.settings import ServeConfig
from penstock.server.store import Store
from tests import processes
from tests.server.engine_double import EngineDouble
from tests.server.live import parts

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(folder: Path, trouble: str = "") -> Iterator[tuple[processes.Process[str], str]]:
    """A server, and its URL; ended when the block is."""
    command = [sys.executable, "-m", "tests.server.server_process", str(folder), trouble]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    options = {"cwd": ROOT, "env": environment, "stdout": processes.PIPE, "text": True}
    with (folder / "log").open("a") as log, processes.Process[str](command, stderr=log, **options) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+:\d+", server.stdout.readline())
        assert found, (folder / "log").read_text()
        yield server, found[0]


def video(url: str) -> str:
    """Ask for a video, and wait until it is under way."""
    with httpx2.Client(base_url=url) as http:
        video_id = str(http.post("/v1/videos", json={"prompt": "x"}).json()["id"])
        while http.get(f"/v1/videos/{video_id}").json()["status"] == "queued":
            time.sleep(0.02)
    return video_id


def status(folder: Path, job_id: str) -> tuple[str, str | None]:
    store = Store(f"sqlite:///{folder}/penstock/jobs.sqlite", server="reader")
    job = store.get(job_id)
    store.close()
    assert job is not None
    return job.status, job.error_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, "held") as (server, url):
        job_id = video(url)
        server.send_signal(number)
        assert server.wait(30) == 0
    assert status(tmp_path, job_id) == ("failed", "server_stopped")
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "penstock" / "spool").glob("penstock-spool-*"))


def test_whoever_waits_is_told_before_the_connection_ends(tmp_path: Path) -> None:
    with process(tmp_path, "held") as (server, url), httpx2.Client(base_url=url, timeout=30) as http:
        with http.stream("GET", f"/v1/jobs/{video(url)}/events") as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert server.wait(30) == 0
    assert "event: failed" in text and "server_stopped" in text


def test_the_second_signal_ends_it_at_once_and_the_next_start_tells_the_truth(tmp_path: Path) -> None:
    with process(tmp_path, "stuck") as (server, url):
        job_id = video(url)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(processes.TimeoutExpired):
            server.wait(1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 128 + signal.SIGTERM
    with process(tmp_path) as (server, url):
        assert status(tmp_path, job_id)[0] == "failed"


def test_kill_leaves_no_job_in_progress_after_the_next_start(tmp_path: Path) -> None:
    with process(tmp_path, "held") as (server, url):
        job_id = video(url)
        server.kill()
        server.wait(10)
    assert status(tmp_path, job_id)[0] in ("queued", "in_progress")  # that it began is noted a moment later
    with process(tmp_path) as (server, url), httpx2.Client(base_url=url) as http:
        answer = http.get(f"/v1/videos/{job_id}").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "server_restarted")


def test_what_the_ranks_refuse_ends_it_with_their_words(tmp_path: Path) -> None:
    with process(tmp_path, "refused") as (server, _):
        output, _ = server.communicate(timeout=30)
    assert server.returncode == 2 and "error: offload='none' does not fit" in output


def test_an_engine_that_has_failed_for_good_ends_it_with_its_jobs_and_a_word(tmp_path: Path) -> None:
    with process(tmp_path, "mortal") as (server, url), httpx2.Client(base_url=url) as http:
        job_id = str(http.post("/v1/videos", json={"prompt": "x"}).json()["id"])
        output, _ = server.communicate(timeout=30)
    assert server.returncode == 1 and "error: no ranks run any more" in output
    assert status(tmp_path, job_id) == ("failed", "rank_died")


def test_a_server_that_cannot_begin_says_so(tmp_path: Path) -> None:
    with process_that_fails(tmp_path, "lifeless", 1) as output:
        assert "error: the server could not begin" in output and "listening" not in output


def test_two_on_free_ports_go_by_names_of_their_own(tmp_path: Path) -> None:
    with process(tmp_path, "unnamed") as (_, one), process(tmp_path, "unnamed") as (_, other):
        names = set()
        for url in (one, other):
            with httpx2.Client(base_url=url) as http:
                names.add(http.get("/v1/config").json()["server"]["server_name"])
        assert len(names) == 2


def test_proxies_are_believed_where_they_are_named(tmp_path: Path) -> None:
    for given, believed in (([], "127.0.0.1"), (["127.0.0.1"], "9.9.9.9")):
        engine = EngineDouble()
        app, store, _, _ = parts(tmp_path, engine, trusted_proxy=given)
        with bind("127.0.0.1", 0) as listener:
            url = address_of(listener)
            server = Server(app, engine, url, lambda line: None)  # type: ignore[arg-type]
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            with httpx2.Client(base_url=url, headers={"x-forwarded-for": "9.9.9.9"}) as http:
                assert http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 200
            server.should_exit = True
            thread.join(30)
        assert engine.orders[0].client == believed
        store.close()


def test_two_of_one_name_do_not_share_a_database(tmp_path: Path) -> None:
    with process(tmp_path) as (_, _), process_that_fails(tmp_path) as output:
        assert "--server-name" in output


@contextmanager
def process_that_fails(folder: Path, trouble: str = "", code: int = 2) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.server.server_process", str(folder), trouble]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    yield done.stdout


def test_addresses() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on: .*another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no address of this machine"):
        bind("no.such.host.invalid", 0)


def test_a_network_without_a_key_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = EngineDouble()
    with pytest.raises(ConfigError, match="--api-key"):
        run(ServeConfig(host="0.0.0.0"), engine, model="double")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir()) and engine.is_closed


def test_names_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_name(ServeConfig(server_name="alpha"), 8000) == "alpha"
    names = {server_name(ServeConfig(port=0), port) for port in (8000, 8001)}  # the ports that they got
    assert len(names) == 2 and all(socket.gethostname() in name for name in names)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "penstock"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder() == Path.home() / ".cache" / "penstock"

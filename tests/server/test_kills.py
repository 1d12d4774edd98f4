"""Ranks and servers that are killed or stopped at the worst moment: nothing promised is lost, nothing stays."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import zoo
from tests.processes import is_running
from tests.server.served import Served, served

pytestmark = pytest.mark.thorough
NOTICED_S = 10.0
QUICK = ("--rank-timeout-s", "3")
SHORT: dict[str, Any] = {"prompt": "a", "size": "64x64", "num_inference_steps": 1, "num_frames": 9}
LONG: dict[str, Any] = {**SHORT, "num_inference_steps": 1000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(zoo.folder("ltx2", tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose one group has two ranks."""
    with served(folder, tmp_path_factory.mktemp("pair"), "--cfg-parallel-size", "2", *QUICK) as server:
        yield server


def ask(server: Served, body: dict[str, Any]) -> str:
    """Begin a video; its id."""
    answer = server.http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def job_of(server: Served, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = server.http.get(f"/v1/videos/{job_id}").json()
    return job


def await_end(server: Served, job_id: str, within_s: float) -> dict[str, Any]:
    deadline_s = time.monotonic() + within_s
    while (job := job_of(server, job_id))["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline_s, job
        time.sleep(0.05)
    return job


def await_stage(server: Served, job_id: str, stage: str) -> None:
    """Return at the moment in which a stage of a job begins."""
    with server.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and json.loads(line.removeprefix("data: ")).get("stage") == stage:
                return
    raise AssertionError(f"it ended before {stage}")


def await_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + NOTICED_S
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "save"])
def test_a_group_that_is_killed_fails_what_runs_and_makes_what_waits(pair: Served, stage: str) -> None:
    num_frames = 161 if stage in ("decode", "save") else 9  # which takes its time
    running = ask(pair, {**(LONG if stage == "denoise" else SHORT), "num_frames": num_frames})
    waiting = ask(pair, SHORT)
    pids = pair.rank_pids()
    assert len(pids) == 2
    await_stage(pair, running, stage)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    job = await_end(pair, running, NOTICED_S)
    assert (job["status"], job["error"]["code"]) == ("failed", "rank_died")
    assert await_end(pair, waiting, 120)["status"] == "completed"
    await_gone(pids)
    assert not set(pids) & set(pair.rank_pids())


def test_a_rank_that_stands_still_is_noticed_and_replaced(pair: Served) -> None:
    running, waiting = ask(pair, LONG), ask(pair, SHORT)
    await_stage(pair, running, "denoise")
    pids = pair.rank_pids()
    os.kill(pids[1], signal.SIGSTOP)
    job = await_end(pair, running, NOTICED_S)
    assert (job["status"], job["error"]["code"]) == ("failed", "rank_hung")
    await_gone(pids)
    assert await_end(pair, waiting, 120)["status"] == "completed"


@pytest.mark.parametrize("stage", ["denoise", "save"])
def test_a_server_that_is_killed_leaves_no_process_and_no_job_under_way(
    folder: Path, tmp_path: Path, stage: str
) -> None:
    with served(folder, tmp_path) as server:
        done = ask(server, SHORT)
        assert await_end(server, done, 120)["status"] == "completed"
        content = server.http.get(f"/v1/videos/{done}/content").content
        running = ask(server, LONG if stage == "denoise" else {**SHORT, "num_frames": 161})
        waiting = [ask(server, SHORT) for _ in range(2)]
        pids = server.rank_pids()
        await_stage(server, running, stage)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        await_gone(pids)
    with served(folder, tmp_path) as again:  # on another port
        assert job_of(again, done)["status"] == "completed"
        assert again.http.get(f"/v1/videos/{done}/content").content == content
        for job_id in (running, *waiting):
            job = job_of(again, job_id)
            assert job["status"] == "failed" and job["error"]["message"], job
        assert await_end(again, ask(again, SHORT), 120)["status"] == "completed"

"""No work is begun that could not be kept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.server import conditions
from penstock.server.conditions import Conditions
from penstock.server.failures import ApiError
from tests.server.live import Live, serving

ASKED = {"prompt": "x", "seed": 1}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path) as found:
        yield found


class Disk:
    """A disk with as many free bytes as a test says."""

    f_frsize, f_files, f_favail = 1, 0, 0

    def __init__(self, free: int) -> None:
        self.f_bavail = free


def test_without_room_nothing_is_made_and_health_says_so(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with live.client() as http, monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: Disk(1000))
        answer = http.post("/v1/images/generations", json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
        assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
        assert live.engine.orders == [] and http.get("/v1/jobs").json()["data"] == []
        health, ready = http.get("/health"), http.get("/ready")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert [one["code"] for one in health.json()["problems"]] == ["storage_full"]
        assert ready.status_code == 503 and "no room" in ready.json()["reason"]
        assert str(live.spool) not in health.text + ready.text
        patch.undo()
        live.app.state.service.conditions.problems = {}  # the next look, which may be 5 s away
        assert http.post("/v1/images/generations", json=ASKED).status_code == 200
        assert http.get("/health").json()["problems"] == []


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_database_that_lost_its_file_takes_no_work(live: Live, tmp_path: Path, is_replaced: bool) -> None:
    file = tmp_path / "jobs.db"
    with live.client() as http:
        assert http.post("/v1/images/generations", json=ASKED).status_code == 200
        away = file.rename(tmp_path / "away.db")
        if is_replaced:
            file.write_bytes(away.read_bytes())
        answer = http.post("/v1/images/generations", json=ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_lost")
        assert answer.headers["x-should-retry"] == "false" and len(live.engine.orders) == 1
        assert http.get("/health").json()["problems"][0]["code"] == "database_lost"
        away.replace(file)
        asyncio.run(live.app.state.service.conditions.look())
        assert http.post("/v1/images/generations", json=ASKED).status_code == 200


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_that_is_gone_is_told_from_a_full_one(tmp_path: Path, least: int, is_file: bool) -> None:
    folder = tmp_path / "files"
    if is_file:
        folder.touch()
    looked = Conditions(None, [folder], least)
    asyncio.run(looked.look())
    with pytest.raises(ApiError) as caught:
        looked.require()
    assert (caught.value.status, caught.value.code) == (503, "storage_lost")
    assert list(looked.problems) == ["storage_lost"]


def test_they_are_looked_at_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "LOOK_S", 0.01)
    looked = Conditions(None, [tmp_path / "gone"], 1)

    async def main() -> None:
        watching = asyncio.create_task(looked.watch())
        async with asyncio.timeout(20):
            while not looked.problems:
                await asyncio.sleep(0.01)
            (tmp_path / "gone").mkdir()
            while looked.problems:
                await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(main())
    looked.require()


@pytest.mark.parametrize(
    ("least", "disk", "is_fine"),
    [
        (0, {"f_bavail": 0}, True),
        (10, {"f_bavail": 10}, True),
        (11, {"f_bavail": 10}, False),
        (1, {"f_bavail": 9, "f_files": 5, "f_favail": 0}, False),
    ],
)
def test_what_counts_as_room(
    tmp_path: Path, least: int, disk: dict[str, Any], is_fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Disk(0)
    vars(found).update(disk)
    monkeypatch.setattr(os, "statvfs", lambda folder: found)
    looked = Conditions(None, [tmp_path], least)
    asyncio.run(looked.look())
    if is_fine:
        looked.require()
    else:
        with pytest.raises(ApiError) as caught:
            looked.require()
        assert caught.value.status == 507

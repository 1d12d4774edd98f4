"""Alive, ready, measured, configured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.engine.status import EngineStatus, GroupStatus
from penstock.server.operations import public_settings
from penstock.server.settings import ServeConfig
from tests.server.engine_double import EngineDouble
from tests.server.live import serving


@pytest.mark.parametrize(
    ("states", "status", "said", "is_ready"),
    [
        (["idle", "busy"], 200, "ok", True),
        (["idle", "restarting"], 200, "degraded", True),
        (["busy", "failed"], 200, "degraded", True),
        (["starting", "starting"], 503, "starting", False),
        (["restarting"], 503, "down", False),
        (["failed"], 503, "down", False),
    ],
)
def test_health_is_what_the_ranks_are(
    tmp_path: Path, states: list[Any], status: int, said: str, is_ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [GroupStatus(number=number, state=state, order_ids=["x"]) for number, state in enumerate(states)]
    engine = EngineDouble()
    monkeypatch.setattr(engine, "status", lambda: EngineStatus(groups=groups, queue_depth=3, steps_per_s=1.5))
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (status, said)
        assert answer.json()["queue_depth"] == 3 and [group["state"] for group in answer.json()["groups"]] == states
        assert "order_ids" not in answer.json()["groups"][0] and answer.json()["groups"][0]["num_orders"] == 1
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["ready"]) == (200 if is_ready else 503, is_ready)
        assert ("retry-after" in ready.headers) == (not is_ready)


def test_a_server_that_stops_is_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        assert http.get("/ready").status_code == 200
        live.app.state.service.jobs.is_stopping = True
        answer = http.get("/ready")
        assert answer.status_code == 503 and answer.json()["reason"] == "stopping"
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/images/generations", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]


def test_metrics_by_route_not_by_path(tmp_path: Path) -> None:
    with serving(tmp_path) as live, live.client() as http:
        http.post("/v1/images/generations", json={"prompt": "x"})
        for number in range(5):
            http.get(f"/v1/jobs/image_{number}")
            http.get(f"/nothing/{number}")
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'penstock_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 5.0' in lines
    assert 'penstock_http_requests_total{method="GET",route="none",status="404"} 5.0' in lines
    assert 'penstock_jobs_total{kind="image",status="completed"} 1.0' in lines
    assert not any("image_3" in line or "/nothing" in line for line in lines)


def test_configuration_that_took_effect(tmp_path: Path) -> None:
    with serving(tmp_path, max_queue=7) as live, live.client() as http:
        config = http.get("/v1/config").json()
    assert config["server"]["max_queue"] == 7 and config["effective"]["dtype"] == "float32"
    assert config["model"] == "org/double" and config["server"]["server_name"] == "alpha"


def test_what_a_rank_wrote_last_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = ["rank 1 died (exit 1): OSError: /home/ann/model is not there", "cannot read /home/ann/model", ""]
    states: list[Any] = ["restarting", "failed", "idle"]
    groups = [
        GroupStatus(number=number, state=state, message=message)
        for number, (state, message) in enumerate(zip(states, messages, strict=True))
    ]
    engine = EngineDouble()
    monkeypatch.setattr(engine, "status", lambda: EngineStatus(groups=groups, queue_depth=0, steps_per_s=0.0))
    with serving(tmp_path, engine) as live, live.client() as http:
        answer = http.get("/health")
    assert "/home" not in answer.text
    shown = [group["message"] for group in answer.json()["groups"]]
    assert shown[0] == "rank 1 died (exit 1). The server's log says more." and "log" in shown[1] and shown[2] == ""


@pytest.mark.parametrize(
    "database",
    ["postgresql://ann:pass-word@host:5432/jobs", "postgresql://host:5432/jobs?user=ann&password=pass-word"],
)
def test_what_opens_something_is_not_shown(database: str) -> None:
    settings = ServeConfig(api_key=["sk-ann"], database=database)
    service = SimpleNamespace(settings=settings, jobs=SimpleNamespace(server="alpha"))
    shown = str(public_settings(service))  # type: ignore[arg-type]
    assert "sk-ann" not in shown and "pass-word" not in shown and "host:5432/jobs" in shown


def test_the_server_lives_while_its_ranks_do_not(tmp_path: Path) -> None:
    engine = EngineDouble()
    engine.state = "restarting"
    with serving(tmp_path, engine, api_key=["sk-ann"]) as live, live.client() as http:
        assert http.get("/health").status_code == 503
        answer = http.get("/live")  # without a key
        assert (answer.status_code, answer.json()) == (200, {"live": True})

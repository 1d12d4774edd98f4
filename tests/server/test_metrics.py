"""What is counted and measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.server.metrics import Metrics
from penstock.wire import Timings
from tests.server.engine_double import EngineDouble


@pytest.fixture
def engine() -> Iterator[EngineDouble]:
    double = EngineDouble()
    yield double
    double.close()


def test_everything_that_is_promised_is_there(engine: EngineDouble) -> None:
    metrics = Metrics(engine)  # type: ignore[arg-type]
    metrics.observe(Timings(queue_s=1, encode_s=2, denoise_s=3, decode_s=4, save_s=5, total_s=15, num_steps=8))
    metrics.jobs.labels("image", "completed").inc()
    metrics.failures.labels("out_of_memory").inc()
    metrics.cancels.labels("client_left").inc()
    metrics.requests.labels("GET", "/health", 200).inc()
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    for part, seconds in {"queue": 1, "encode": 2, "denoise": 3, "decode": 4, "save": 5, "total": 15}.items():
        samples = {sample.name: sample.value for sample in families[f"penstock_{part}_seconds"].samples}
        assert samples[f"penstock_{part}_seconds_sum"] == seconds
    names = "queue_depth steps_per_second groups group_restarts device_memory_bytes host_memory_bytes jobs failures"
    assert {f"penstock_{name}" for name in (*names.split(), "cancels", "http_requests", "steps")} <= families.keys()
    (sample,) = families["penstock_host_memory_bytes"].samples
    assert sample.labels == {"group": "0", "rank": "0"} and sample.value == 2000


def test_names_are_as_prometheus_asks(engine: EngineDouble) -> None:
    text = Metrics(engine).text().decode()  # type: ignore[arg-type]
    assert "\npenstock_group_restarts_total 0.0" in text
    assert "# TYPE penstock_device_memory_bytes gauge" in text
    for family in text_string_to_metric_families(text):
        assert family.type != "counter" or all(one.name.endswith(("_total", "_created")) for one in family.samples)


def test_the_engine_is_asked_when_somebody_looks(engine: EngineDouble) -> None:
    metrics = Metrics(engine)  # type: ignore[arg-type]
    assert b'penstock_groups{state="idle"} 1.0' in metrics.text()
    engine.state = "restarting"
    assert b'penstock_groups{state="restarting"} 1.0' in metrics.text()


def test_servers_count_apart(engine: EngineDouble) -> None:
    one, other = Metrics(engine), Metrics(engine)  # type: ignore[arg-type]
    one.steps.inc(3)
    assert b"penstock_steps_total 3.0" in one.text() and b"penstock_steps_total 0.0" in other.text()


def test_seconds_of_answers_reach_as_far_as_those_of_parts(engine: EngineDouble) -> None:
    metrics = Metrics(engine)  # type: ignore[arg-type]
    metrics.request_s.labels("/v1/images/generations").observe(600)
    value = metrics.registry.get_sample_value
    labels = {"route": "/v1/images/generations"}
    assert value("penstock_http_request_seconds_bucket", {**labels, "le": "500.0"}) == 0
    assert value("penstock_http_request_seconds_bucket", {**labels, "le": "1000.0"}) == 1

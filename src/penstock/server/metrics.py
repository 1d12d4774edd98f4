"""What the server counts and measures, for Prometheus.

Owns the names of the metrics. What the engine knows (queue, ranks, memory) is asked when somebody looks.
Does not know jobs, routes or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.server.job import Job
from penstock.wire import Timings

if TYPE_CHECKING:
    from penstock.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_PARTS = {
    "queue": "Seconds that a request waited for ranks.",
    "encode": "Seconds of encoding prompts and pictures.",
    "denoise": "Seconds of denoising.",
    "decode": "Seconds of decoding latents.",
    "save": "Seconds of writing files on a rank.",
    "total": "Seconds from submission to the last file.",
}
_MEMORY = {
    "device": "Bytes that a rank has on its device: weights and, on a GPU, all else.",
    "host": "Bytes of host memory that the process of a rank holds.",
}


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        registry: holds them.
        requests: answers, by method, route and status.
        request_s: seconds until an answer begins, by route.
        jobs: jobs that ended, by kind and how: completed, failed or cancelled.
        failures: failed jobs, by reason.
        cancels: cancelled jobs, by reason.
        steps: denoising steps done.
        keep_s: seconds of moving a file into the storage.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "penstock_http_requests", "Answers.", ["method", "route", "status"], registry=self.registry
        )
        self.request_s = _histogram(
            "penstock_http_request_seconds", "Seconds until an answer begins.", self.registry, ["route"]
        )
        self.jobs = Counter("penstock_jobs", "Jobs that ended.", ["kind", "status"], registry=self.registry)
        self.failures = Counter("penstock_failures", "Failed jobs by reason.", ["reason"], registry=self.registry)
        self.cancels = Counter("penstock_cancels", "Cancelled jobs by reason.", ["reason"], registry=self.registry)
        self.steps = Counter("penstock_steps", "Denoising steps done.", registry=self.registry)
        self.keep_s = _histogram("penstock_keep_seconds", "Seconds of moving a file into the storage.", self.registry)
        self._parts = {
            part: _histogram(f"penstock_{part}_seconds", text, self.registry) for part, text in _PARTS.items()
        }
        self.running = Gauge("penstock_jobs_unfinished", "Jobs that wait or run.", registry=self.registry)
        self.registry.register(_OfEngine(engine))

    def count(self, job: Job, timings: Timings, cancel_reason: str) -> None:
        """Enter how a job ended."""
        if job.status == "completed":
            self.jobs.labels(job.kind, "completed").inc()
            self.observe(timings)
        elif job.error_code in ("cancelled", "server_stopped"):
            self.jobs.labels(job.kind, "cancelled").inc()
            self.cancels.labels(cancel_reason or "engine").inc()
        else:
            self.jobs.labels(job.kind, "failed").inc()
            self.failures.labels(job.error_code).inc()

    def observe(self, timings: Timings) -> None:
        """Enter where the seconds of a job went."""
        for part, histogram in self._parts.items():
            histogram.observe(getattr(timings, f"{part}_s"))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


def _histogram(name: str, text: str, registry: CollectorRegistry, labels: Sequence[str] = ()) -> Histogram:
    return Histogram(name, text, labels, buckets=_BUCKETS_S, registry=registry)


class _OfEngine:
    """What the engine says of itself at this moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are known once the engine is asked."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The gauges."""
        status = self._engine.status()
        yield _gauge("penstock_queue_depth", "Requests that wait.", status.queue_depth)
        yield _gauge("penstock_steps_per_second", "Denoising steps per second of late.", status.steps_per_s)
        groups = GaugeMetricFamily("penstock_groups", "Groups of ranks by state.", labels=["state"])
        for state in ("starting", "idle", "busy", "restarting", "failed"):
            groups.add_metric([state], sum(group.state == state for group in status.groups))
        yield groups
        restarts = sum(group.num_restarts for group in status.groups)
        yield CounterMetricFamily("penstock_group_restarts", "Restarts of all groups.", value=restarts)
        for where, text in _MEMORY.items():
            memory = GaugeMetricFamily(f"penstock_{where}_memory_bytes", text, labels=["group", "rank"])
            for group in status.groups:
                for rank in group.ranks:
                    memory.add_metric([str(group.number), str(rank.rank)], getattr(rank, f"{where}_bytes"))
            yield memory


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
